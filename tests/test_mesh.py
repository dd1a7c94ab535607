"""Steps on meshes of eight forced host devices equal those on one device, and surgery adds one small all-reduce."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eupmu_jax import aggregators

pytestmark = pytest.mark.slow

MESHES = {
    "8x1": (1, 8, 1, "model"),
    "4x2": (1, 4, 2, "model"),
    "4x2, parameters over data too": (1, 4, 2, "data,model"),
    "2x2x2, objectives over devices": (2, 2, 2, "objective,model"),
}
AGGREGATORS = [
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
]
STEPS = ["explicit vmap", "explicit unroll", "explicit of 3", "two passes", "implicit"]
OTHERS = ["explicit frozen", "accumulate", "guard", "guard of muon", "owa", "mean", "dualproj", "upgrad"]
# What is compared on each mesh. One mesh is enough for what wraps a step and for the aggregators, which are functions
# of the same Gram matrix and losses. Only vmapped steps have an axis of objectives to split.
KINDS = {
    "8x1": STEPS,
    "4x2": [*STEPS, *OTHERS, "implicit level", *AGGREGATORS],
    "4x2, parameters over data too": [*STEPS, "guard of muon"],
    "2x2x2, objectives over devices": ["explicit vmap", "owa"],
}
ROUNDED = {"4x2": ["bfloat16"], "4x2, parameters over data too": ["bfloat16"]}


@pytest.fixture(scope="module")
def rows_of_all(on_devices):
    def made(kinds, **environment):
        chosen = {name: (*mesh, kinds[name]) for name, mesh in MESHES.items() if kinds[name]}
        finished = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "mesh_run.py"), json.dumps(chosen)],
            env=on_devices(8) | environment,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        return json.loads(finished.stdout)

    steps = {name: [kind for kind in KINDS[name] if kind in STEPS] for name in MESHES}
    others = {name: [kind for kind in KINDS[name] if kind not in STEPS] + ROUNDED.get(name, []) for name in MESHES}
    # XLA's optimizations determine which collectives a program has; of the others only the results matter.
    optimized, rest = made(steps, JAX_DISABLE_MOST_OPTIMIZATIONS="0"), made(others)
    return {name: rest.get(name, {}) | optimized[name] for name in MESHES}


@pytest.fixture(scope="module", params=MESHES)
def rows(request, rows_of_all):
    return rows_of_all[request.param] | {"mesh": MESHES[request.param]}


def count(row, kind):
    return sum(found == kind for found, _ in row["collectives"])


@pytest.mark.parametrize(("mesh", "kind"), [(mesh, kind) for mesh in MESHES for kind in KINDS[mesh]])
def test_a_mesh_of_eight_equals_one_device(rows_of_all, mesh, kind):
    row = rows_of_all[mesh][kind]
    assert row["moved"] > 0.05
    assert row["weight"] > 0
    assert max(row["distance"]["params"].values()) < 1e-5
    assert row["distance"]["weights"] < 1e-5 * max(1, row["weight"])


@pytest.mark.parametrize("mesh", ROUNDED)
def test_bfloat16_gradients_differ_by_their_own_rounding(rows_of_all, mesh):
    row = rows_of_all[mesh]["bfloat16"]
    assert 0 < max(row["distance"]["params"].values()) < 1e-4
    assert row["distance"]["weights"] < 1e-4


def test_every_aggregator_runs_on_a_mesh():
    assert {name for name in aggregators.__all__ if name.islower()} <= set(KINDS["4x2"])


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


OF_GRAM = {"explicit vmap": 3, "explicit unroll": 3, "explicit of 3": 6}


@pytest.mark.parametrize(("mesh", "kind"), [(mesh, kind) for mesh in MESHES for kind in OF_GRAM if kind in KINDS[mesh]])
def test_the_gram_matrix_is_one_all_reduce_of_its_upper_triangle(rows_of_all, mesh, kind):
    _, _, model, axes = MESHES[mesh]
    found = [shape for _, shape in rows_of_all[mesh][kind]["collectives"]]
    assert found.count(f"f32[{OF_GRAM[kind]}]") == int(model > 1 or axes != "model")


def test_surgery_adds_no_other_collective_to_the_plain_step(rows):
    objective, _, model, axes = rows["mesh"]
    row, plain = rows["explicit vmap"], rows["plain"]
    assert count(plain, "all-reduce") > 0
    if objective == 1:
        for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            assert count(row, kind) <= count(plain, kind), kind
    if axes == "model":
        assert count(row, "all-reduce") == count(plain, "all-reduce") + int(model > 1)
