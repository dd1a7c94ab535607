"""Steps on meshes of eight forced host devices equal those on one, and surgery adds one small all-reduce."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MESHES = {
    "8x1": (1, 8, 1, "model"),
    "4x2": (1, 4, 2, "model"),
    "4x2, parameters over data too": (1, 4, 2, "data,model"),
    "2x2x2, objectives over devices": (2, 2, 2, "objective,model"),
}
KINDS = [
    "explicit vmap",
    "explicit unroll",
    "explicit of 3",
    "explicit frozen",
    "accumulate",
    "guard",
    "guard of muon",
    "owa",
    "mean",
    "dualproj",
    "upgrad",
    "pcgrad",
    "cagrad",
    "mgda",
    "imtl_g",
    "nash_mtl",
    "aligned_mtl",
    "config",
    "ngdiff",
    "gdr_gma",
    "chebyshev",
    "omd_tch",
    "famo",
    "two passes",
    "implicit",
    "implicit level",
]


@pytest.fixture(scope="module")
def rows_of_all():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    # Which collectives a program has is up to the optimizations.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "mesh_run.py"), json.dumps(MESHES)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


@pytest.fixture(scope="module", params=MESHES)
def rows(request, rows_of_all):
    return rows_of_all[request.param] | {"mesh": MESHES[request.param]}


def count(row, kind):
    return sum(found == kind for found, _ in row["collectives"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_of_eight_equals_one_device(rows, kind):
    if kind not in rows:
        pytest.skip("objectives over devices: for vmapped steps; 8x1: a few; aggregators: on 4x2, the newer ones")
    row = rows[kind]
    assert row["moved"] > 0.05
    assert row["weight"] > 0
    assert max(row["distance"]["params"].values()) < 1e-5
    assert row["distance"]["weights"] < 1e-5 * max(1, row["weight"])


def test_bfloat16_gradients_differ_by_their_own_rounding(rows):
    if "bfloat16" in rows:
        assert 0 < max(rows["bfloat16"]["distance"]["params"].values()) < 1e-4
        assert rows["bfloat16"]["distance"]["weights"] < 1e-4


def test_parameters_keep_their_shardings(rows):
    axes = rows["mesh"][-1]
    assert (
        rows["explicit vmap"]["specs"]["hidden"]
        == {
            "model": [None, "model"],
            "data,model": ["model", "data"],
            "objective,model": ["model", "objective"],
        }[axes]
    )
    assert rows["explicit vmap"]["specs"]["bias"] == [None]


@pytest.mark.parametrize(("kind", "numbers"), [("explicit vmap", 3), ("explicit unroll", 3), ("explicit of 3", 6)])
def test_the_gram_matrix_is_one_all_reduce_of_its_upper_triangle(rows, kind, numbers):
    if kind in rows:
        _, _, model, axes = rows["mesh"]
        split = model > 1 or axes != "model"
        assert [shape for _, shape in rows[kind]["collectives"]].count(f"f32[{numbers}]") == int(split)


def test_surgery_adds_no_other_collective_to_the_plain_step(rows):
    objective, _, model, axes = rows["mesh"]
    row, plain = rows["explicit vmap"], rows["plain"]
    assert count(plain, "all-reduce") > 0
    if objective == 1:
        for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            assert count(row, kind) <= count(plain, kind), kind
    if axes == "model":
        assert count(row, "all-reduce") == count(plain, "all-reduce") + int(model > 1)
