"""Whether a tuple of bare arrays is one stacked batch or a batch for each objective."""

import jax.numpy as jnp
import numpy as np

from eupmu_jax import stacked_value_and_grad

MEAN = lambda params, batch: params * jnp.mean(batch)
TOTAL = lambda params, batch: params * jnp.sum(batch)
PRODUCT = lambda params, batch: params * jnp.sum(batch[0] * batch[1])


def losses_of(loss, *batches):
    return stacked_value_and_grad(loss)(1.0, batches)[0]


def test_integers_beside_floats_are_parts_of_one_stacked_batch_unless_the_losses_say_otherwise():
    tokens, mask = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(losses_of(PRODUCT, tokens, mask), [3, 11])
    np.testing.assert_allclose(losses_of([PRODUCT, PRODUCT], tokens, mask), [3, 11])
    np.testing.assert_allclose(losses_of([TOTAL, MEAN], jnp.arange(4), jnp.ones(4)), [6, 1])


def test_arrays_of_one_example_are_batches():
    np.testing.assert_allclose(losses_of(MEAN, jnp.ones((1, 3)), jnp.zeros((1, 3))), [1, 0])


def test_three_arrays_for_two_losses_are_parts_of_one_stacked_batch():
    ones = jnp.ones((2, 4))
    np.testing.assert_allclose(losses_of([PRODUCT, PRODUCT], ones, 2 * ones, ones), [8, 8])
