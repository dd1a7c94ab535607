import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eupmu_jax import objectives
from eupmu_jax.methods.salun import saliency_mask, salun
from eupmu_jax.methods.weighted_sum import weighted_sum

SETTINGS = {"learning_rate": 0.3, "forget_objective": "random_labels", "mask_fraction": 0.3}
RETAIN_SHARE = 4.0  # batches of 128 and 32


def bits(tree):
    return np.asarray(ravel_pytree(tree)[0]).view(np.uint32)


def mask_of(problem, fraction):
    """Worked out apart: the gradient at once, and numpy's sort."""
    loss = lambda p: objectives.cross_entropy(
        problem.problem.apply(p, problem.forget["images"]), problem.forget["labels"]
    )
    magnitudes = np.abs(np.asarray(ravel_pytree(jax.grad(loss)(problem.params))[0]))
    return magnitudes >= np.sort(magnitudes)[len(magnitudes) - int(fraction * len(magnitudes))]


@pytest.mark.parametrize("extra", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_weights_outside_the_mask_keep_their_bits(problem, extra):
    params = problem.run(salun, SETTINGS | extra, steps=10)
    moved = bits(params) != bits(problem.params)
    mask = mask_of(problem, 0.3)
    # Sums over chunks round differently, which may swap neighbours at the threshold.
    assert np.sum(moved & ~mask) <= 2
    assert moved.sum() > 0.9 * mask.sum()
    assert moved.sum() <= mask.sum()


def test_a_whole_mask_is_the_weighted_sum_of_mixed_batches(problem):
    masked = problem.run(salun, SETTINGS | {"mask_fraction": 1.0}, steps=5)
    plain = problem.run(
        weighted_sum,
        {"learning_rate": 0.3, "forget_objective": "random_labels", "retain_weight": RETAIN_SHARE},
        steps=5,
    )
    chex.assert_trees_all_close(masked, plain, atol=1e-6)


def test_a_masked_step_is_clipped_by_what_may_move(problem):
    params = problem.run(salun, SETTINGS | {"learning_rate": 0.01}, steps=1)
    length = np.linalg.norm(ravel_pytree(params)[0] - ravel_pytree(problem.params)[0])
    assert length == pytest.approx(0.01, rel=1e-2)


def test_it_forgets_and_retains(problem):
    params = problem.run(salun, SETTINGS, steps=60)
    assert problem.accuracy(params, problem.forget) < 0.2
    assert problem.accuracy(params, problem.retain) > 0.97


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.7, 0.9, 1.0])
def test_the_mask_has_exactly_its_size_in_spite_of_ties(fraction):
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.integers(-3, 4, (20, 10)), jnp.float32), "b": [jnp.zeros(50), jnp.ones((5, 5, 2))]}
    flat = np.abs(np.asarray(ravel_pytree(tree)[0]))
    expected = np.zeros(300, bool)
    expected[np.argsort(-flat, kind="stable")[: round(300 * fraction)]] = True
    actual = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(saliency_mask(tree, fraction))])
    np.testing.assert_array_equal(actual, expected)
