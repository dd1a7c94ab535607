"""Every method still reproduces its saved row on any processor, unless its version has changed."""

import jax
import numpy as np
import pytest

from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from experiments.every_method import run

pytestmark = pytest.mark.slow

RTOL = 2e-3


@pytest.fixture(scope="module")
def saved():
    return rows.read(run.ROWS)


def differences(row, other):
    """A description of the differences between two rows beyond the rounding of another processor."""
    exact = [name for name in ("settings", "steps") if row[name] != other[name]]
    close = [name for name in run.FIGURES if not np.allclose(row[name], other[name], rtol=RTOL, atol=0)]
    return "; ".join(f"{name}: got {row[name]}, expected {other[name]}" for name in exact + close)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reproduces_its_saved_row(name, saved):
    known = rows.select(saved, **run.key(name))
    assert len(known) == 1, f"{name} has {len(known)} rows of its version, expected one; make it with: {run.COMMAND}"
    row = run.unlearn(name)
    differs = differences(row, known[0])
    assert not differs, (
        f"{name} makes other figures than its saved row of version {METHODS[name].version}. {differs}. If that is "
        f"meant, raise METHOD.version where the method is defined, and make the row again with: {run.COMMAND}"
    )
    assert row["change"] > 0
    # Figures that depend on the last bit of a parameter would differ between processors.
    wiggle = lambda leaf: leaf * (1 + 1e-6 * jax.random.normal(jax.random.key(0), leaf.shape))
    moved = run.unlearn(name, jax.tree.map(wiggle, run.problem()[0]))
    assert not differences(moved, row)


def test_every_larger_difference_is_detected(saved):
    (row,) = rows.select(saved, **run.key("SalUn"))
    assert not differences(row, row)
    for name in run.FIGURES:
        assert differences(row | {name: (np.array(row[name]) * (1 + 2 * RTOL)).tolist()}, row).startswith(name)
    assert differences(row | {"settings": row["settings"] | {"learning_rate": 1e-3}}, row).startswith("settings")
