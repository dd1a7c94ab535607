import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from eupmu_jax.aggregators import owa

GRADS = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
LOSSES = jnp.array([1.0, 3.0, 2.0])


def combined(tx, grads=GRADS, losses=LOSSES):
    """The direction and the weights of one step."""
    direction, state = tx.update(grads, tx.init(grads[0]), losses=losses)
    return direction, state.weights


@pytest.mark.parametrize(
    ("kwargs", "weights"),
    [
        ({}, np.array([1, 5, 3]) / 9),
        ({"weights": np.array([0.5, 0.3, 0.2])}, [0.2, 0.5, 0.3]),
        ({"weights": np.array([1.0, 0.0, 0.0])}, [0.0, 1.0, 0.0]),
        ({"weights": np.array([0.0, 0.0, 1.0])}, [1.0, 0.0, 0.0]),
        ({"weights": np.array([2.0, 0.0, 2.0])}, [2.0, 2.0, 0.0]),
        ({"weights": np.ones(3) / 3}, [1 / 3, 1 / 3, 1 / 3]),
        ({"forget_weight": 1.0}, [1.0, 0.75, 0.25]),
        ({"forget_weight": 0.0, "weights": np.array([0.9, 0.1])}, [0.0, 0.9, 0.1]),
    ],
    ids=["Gini", "any", "worst", "best", "sum above 1", "uniform", "forget apart", "forget ignored"],
)
def test_a_row_gets_the_weight_of_its_rank(kwargs, weights):
    direction, seen = combined(owa(**kwargs, num_objectives=3))
    np.testing.assert_allclose(seen, weights, rtol=1e-6)
    np.testing.assert_allclose(direction, np.dot(weights, GRADS), rtol=1e-6)


def test_the_forget_row_has_its_weight_whatever_its_rank():
    tx = owa(forget_weight=0.5, num_objectives=3)
    for forget_loss in (0.0, 2.5, 9.0):
        np.testing.assert_allclose(combined(tx, losses=LOSSES.at[0].set(forget_loss))[1], [0.5, 0.75, 0.25])


seeds = st.integers(0, 10_000)


def problem(seed):
    """Weights by rank, gradients, and distinct losses."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(5, 4))
    losses = rng.permutation(5) + rng.uniform(0, 0.9, size=5)
    return jnp.asarray(rng.uniform(size=5)), jnp.asarray(grads), jnp.asarray(losses)


@given(seeds, st.permutations(range(5)))
def test_the_order_of_the_rows_does_not_matter(seed, order):
    by_rank, grads, losses = problem(seed)
    order = np.array(order)
    direction, weights = combined(owa(by_rank), grads, losses)
    permuted, permuted_weights = combined(owa(by_rank), grads[order], losses[order])
    np.testing.assert_array_equal(permuted_weights, weights[order])
    np.testing.assert_allclose(permuted, direction, rtol=1e-5, atol=1e-6)


@jax.jit
def gradients(w, by_rank, targets):
    """The direction of `owa` and the gradient of the sorted weighted loss that it descends."""

    def losses(w):
        return jnp.sum(jnp.abs(w - targets) ** 1.5, axis=1)

    def ordered(w):
        return jnp.sum(by_rank * jnp.sort(losses(w))[::-1])

    return combined(owa(by_rank), jax.jacobian(losses)(w), losses(w))[0], jax.grad(ordered)(w)


@given(seeds)
def test_the_direction_is_the_gradient_of_the_sorted_weighted_loss(seed):
    by_rank, targets, _ = problem(seed)
    direction, gradient = gradients(jnp.ones(4), by_rank, targets)
    np.testing.assert_allclose(direction, gradient, rtol=1e-4, atol=1e-5)


def test_tied_losses_are_ranked_by_their_row_index():
    _, weights = combined(owa(np.array([0.6, 0.3, 0.1])), losses=jnp.array([2.0, 3.0, 2.0]))
    np.testing.assert_allclose(weights, [0.3, 0.6, 0.1])
    _, weights = combined(owa(np.array([0.6, 0.3, 0.1])), losses=jnp.zeros(3))
    np.testing.assert_allclose(weights, [0.6, 0.3, 0.1])


def test_an_infinite_gradient_of_weight_zero_refuses_the_step():
    direction, _ = combined(owa(np.array([1.0, 0.0, 0.0])), grads=GRADS.at[0, 0].set(jnp.inf))
    np.testing.assert_array_equal(direction, 0)


def test_the_first_step_fixes_an_unknown_number_of_objectives():
    tx = owa()
    state = tx.init(GRADS[0])
    chex.assert_shape(state.weights, (2,))
    _, state = tx.update(GRADS, state, losses=LOSSES)
    chex.assert_shape(state.weights, (3,))
    chex.assert_shape(owa(np.ones(3)).init(GRADS[0]).weights, (3,))
    chex.assert_shape(owa(np.ones(3), forget_weight=1.0).init(GRADS[0]).weights, (4,))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": np.array([0.5, -0.1])}, r"^weights: got \["),
        ({"weights": np.array([0.5, np.nan])}, r"^weights: got \["),
        ({"weights": 1.0}, r"^weights: got shape \(\)"),
        ({"weights": np.ones((2, 2))}, r"^weights: got shape \(2, 2\)"),
        ({"weights": np.ones(3), "num_objectives": 2}, "^weights: got 3, expected 2"),
        ({"weights": np.ones(3), "num_objectives": 3, "forget_weight": 1.0}, "^weights: got 3, expected 2"),
    ],
)
def test_the_factory_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        owa(**kwargs)


def test_the_update_refuses():
    with pytest.raises(ValueError, match=r"^losses: got None"):
        combined(owa(), losses=None)
    with pytest.raises(ValueError, match=r"^losses: got shape \(2,\)"):
        combined(owa(), losses=jnp.ones(2))
    with pytest.raises(ValueError, match=r"^updates: got 3 objectives, expected 2"):
        combined(owa(np.ones(2)))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_negative_or_infinite_forget_weight_is_refused(weight):
    with pytest.raises(ValueError, match=r"^forget_weight: got"):
        owa(forget_weight=weight)
