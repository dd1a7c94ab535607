import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eupmu_jax.methods.salun import saliency_mask

# The contract of every method is in test_table.
pytestmark = pytest.mark.slow

SETTINGS = {"learning_rate": 0.3, "forget_objective": "random_labels", "mask_fraction": 0.3}
RETAIN_SHARE = 4.0  # batches of 128 and 32


def bits(tree):
    return np.asarray(ravel_pytree(tree)[0]).view(np.uint32)


def mask_of(digits, fraction):
    """The mask computed independently, from the gradient of the whole set and NumPy's sort."""
    task, forget = digits.task, digits.forget.tree
    loss = lambda p: task.retain(task.outputs(p, forget, None), forget)
    magnitudes = np.abs(np.asarray(ravel_pytree(jax.grad(loss)(digits.params))[0]))
    return magnitudes >= np.sort(magnitudes)[len(magnitudes) - int(fraction * len(magnitudes))]


def test_weights_outside_the_mask_stay_bit_for_bit(digits):
    params = digits.run("SalUn", SETTINGS | {"momentum": 0.9, "weight_decay": 0.1}, steps=10)
    moved = bits(params) != bits(digits.params)
    mask = mask_of(digits, 0.3)
    # Sums over chunks round differently, which may swap neighbouring weights at the threshold.
    assert np.sum(moved & ~mask) <= 2
    assert moved.sum() > 0.9 * mask.sum()
    assert moved.sum() <= mask.sum()


def test_a_full_mask_gives_the_weighted_sum_on_mixed_batches(digits):
    masked = digits.run("SalUn", SETTINGS | {"mask_fraction": 1.0}, steps=5)
    plain = digits.run(
        "weighted sum",
        {"learning_rate": 0.3, "forget_objective": "random_labels", "retain_weight": RETAIN_SHARE},
        steps=5,
    )
    chex.assert_trees_all_close(masked, plain, atol=1e-6)


def test_a_masked_step_is_clipped_by_the_norm_of_the_weights_that_may_move(digits):
    params = digits.run("SalUn", SETTINGS | {"learning_rate": 0.01}, steps=1)
    length = np.linalg.norm(ravel_pytree(params)[0] - ravel_pytree(digits.params)[0])
    assert length == pytest.approx(0.01, rel=1e-2)


def test_salun_forgets_and_retains(digits):
    params = digits.run("SalUn", SETTINGS, steps=60)
    assert digits.accuracy(params, digits.forget) < 0.2
    assert digits.accuracy(params, digits.retain) > 0.97


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.7, 0.9, 1.0])
def test_the_mask_has_exactly_its_size_in_spite_of_ties(fraction):
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.integers(-3, 4, (20, 10)), jnp.float32), "b": [jnp.zeros(50), jnp.ones((5, 5, 2))]}
    flat = np.abs(np.asarray(ravel_pytree(tree)[0]))
    expected = np.zeros(300, bool)
    expected[np.argsort(-flat, kind="stable")[: round(300 * fraction)]] = True
    actual = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(saliency_mask(tree, fraction))])
    np.testing.assert_array_equal(actual, expected)
