"""Directions of TorchJD, an independent implementation, for seeded problems; `make_golden.py` wrote them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from eupmu_jax import aggregators

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())

# Name: this library's aggregator, and the error of TorchJD's own solver relative to the length of the direction.
METHODS = {
    "mean": (aggregators.mean, 1e-12),
    "upgrad": (aggregators.upgrad, 1e-8),
    "dualproj": (aggregators.dualproj, 1e-8),
    "pcgrad": (aggregators.pcgrad, 1e-12),
    "cagrad": (functools.partial(aggregators.cagrad, 0.4), 1e-4),
    "mgda": (aggregators.mgda, 1e-2),
    "imtl_g": (aggregators.imtl_g, 1e-10),
    "nash_mtl": (aggregators.nash_mtl, 1e-4),
    "aligned_mtl min": (aggregators.aligned_mtl, 1e-9),
    "aligned_mtl median": (functools.partial(aggregators.aligned_mtl, "median"), 1e-9),
    "aligned_mtl rmse": (functools.partial(aggregators.aligned_mtl, "rmse"), 1e-9),
    "config": (aggregators.config, 1e-10),
}


@functools.partial(jax.jit, static_argnums=0)
def combined(make, rows):
    tx = make(num_objectives=len(rows))
    return tx.update(rows, tx.init(rows[0]))[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("problem", GOLDEN["problems"], ids=lambda problem: f"K={len(problem['rows'])}")
def test_the_direction_matches_torchjd(name, problem):
    if name not in problem["directions"]:
        pytest.skip("TorchJD's own solver does not converge")
    make, tolerance = METHODS[name]
    expected = np.array(problem["directions"][name])
    with jax.enable_x64(True):
        direction = np.asarray(combined(make, np.array(problem["rows"])))
    if name == "nash_mtl":
        # TorchJD normalises the Gram matrix and sets the length by clipping, so compare the unit directions.
        direction, expected = direction / np.linalg.norm(direction), expected / np.linalg.norm(expected)
    assert np.linalg.norm(direction - expected) < tolerance * np.linalg.norm(expected)
