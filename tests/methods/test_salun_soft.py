import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree

from eupmu_jax.methods.salun_soft import kth_smallest, soft_threshold

# The contract of every method is in test_table.
pytestmark = pytest.mark.slow

SETTINGS = {"learning_rate": 0.3, "forget_objective": "random_labels", "sparsity": 0.7}
# Excludes subnormal numbers, which XLA flushes to 0 on CPU.
magnitudes = st.just(0.0) | st.floats(2.0**-90, 2.0**90, width=32) | st.sampled_from([1.0, 2.0])
threshold = jax.jit(soft_threshold)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@given(hnp.arrays(np.float32, 12, elements=magnitudes), st.integers(0, 12))
def test_kth_smallest_equals_that_of_a_sort(values, k):
    tree = [jnp.asarray(values[:5]), jnp.asarray(values[5:]).reshape(7, 1)]
    expected = np.sort(values)[k - 1] if k else 0
    assert float(jax.jit(kth_smallest)(tree, k)) == expected


@given(hnp.arrays(np.float32, 12, elements=magnitudes), st.integers(0, 12), st.integers(0, 2**12))
def test_the_threshold_zeroes_exactly_the_smallest(values, k, signs):
    values = np.where(signs >> np.arange(12) & 1, -values, values)
    tau = np.sort(np.abs(values))[k - 1] if k else 0
    result = np.asarray(threshold({"x": jnp.asarray(values)}, jnp.int32(k))["x"])
    np.testing.assert_array_equal(result == 0, np.abs(values) <= tau)
    np.testing.assert_allclose(result, np.sign(values) * np.maximum(np.abs(values) - tau, 0), rtol=1e-6)


def test_one_step_is_a_thresholded_plain_step(digits):
    plain = digits.run(
        "weighted sum", {"learning_rate": 0.3, "forget_objective": "random_labels", "retain_weight": 4.0}, steps=1
    )
    change = flat(plain) - flat(digits.params)
    held = int(0.7 * len(change))
    tau = np.sort(np.abs(change))[held - 1]
    expected = flat(digits.params) + np.sign(change) * np.maximum(np.abs(change) - tau, 0)
    actual = flat(digits.run("SalUn-soft", SETTINGS, steps=1))
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    assert np.sum(actual == flat(digits.params)) >= held


@pytest.mark.parametrize("steps", [2, 5])
def test_fewer_weights_are_held_as_the_run_proceeds(digits, steps):
    params = flat(digits.run("SalUn-soft", SETTINGS, steps=steps))
    # Dead weights never move, and the last step holds a share of 0.7 / steps of all weights.
    held = np.mean(params == flat(digits.params))
    plain = flat(digits.run("SalUn-soft", SETTINGS | {"sparsity": 0.0}, steps=steps))
    dead = np.mean(plain == flat(digits.params))
    assert held >= 0.7 / steps - 1e-3
    assert held <= max(0.7 / steps, dead) + 0.05


def test_without_sparsity_it_is_the_weighted_sum(digits):
    soft = digits.run("SalUn-soft", SETTINGS | {"sparsity": 0.0}, steps=5)
    plain = digits.run(
        "weighted sum", {"learning_rate": 0.3, "forget_objective": "random_labels", "retain_weight": 4.0}, steps=5
    )
    chex.assert_trees_all_close(soft, plain, atol=1e-5)


def test_salun_soft_forgets_and_retains(digits):
    params = digits.run("SalUn-soft", SETTINGS, steps=60)
    assert digits.accuracy(params, digits.forget) < 0.2
    assert digits.accuracy(params, digits.retain) > 0.97
