"""Inner products of stacked rows against float64, on long and short leaves of divisible and other sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax._stack import algebra, products


def rows(k, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(k, *shape)).astype(np.float32) + 0.5


@pytest.fixture(autouse=True)
def every_leaf_is_large(monkeypatch):
    monkeypatch.setattr(products, "_SMALL", 0)
    products.sums_of_products.clear_cache()
    yield
    products.sums_of_products.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3, 9])
@pytest.mark.parametrize("shapes", [((64, 96),), ((3, 3, 16, 32), (7,), (31, 33)), ((1024,), ())])
def test_gram_matrix_and_inner_products(k, shapes):
    tree = [rows(k, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    flat = np.concatenate([leaf.reshape(k, -1) for leaf in tree], axis=1).astype(np.float64)
    gram = algebra.gram_matrix(jax.tree.map(jnp.asarray, tree))
    np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-6)
    products = jax.jit(algebra.inner_products)(tree, [leaf[-1] for leaf in tree])
    np.testing.assert_allclose(products, flat @ flat[-1], rtol=1e-6)


def test_a_sum_over_many_elements_stays_accurate():
    # A single running float32 sum of 2^25 ones would stop at 2^24.
    gram = algebra.gram_matrix(jnp.ones((2, 4096, 8192)))
    np.testing.assert_allclose(gram, np.full((2, 2), 2.0**25), rtol=1e-6)


def test_bfloat16_rows_are_summed_in_float32():
    tree = jnp.asarray(rows(2, 64, 64), jnp.bfloat16)
    flat = np.asarray(tree, np.float64).reshape(2, -1)
    np.testing.assert_allclose(algebra.gram_matrix(tree), flat @ flat.T, rtol=1e-6)


@pytest.mark.slow
def test_gram_matrices_can_be_vmapped_and_differentiated():
    trees = jnp.asarray(rows(3, 2, 32, 32))
    grams = jax.vmap(algebra.gram_matrix)(trees)
    np.testing.assert_allclose(grams, jnp.einsum("nkab,nlab->nkl", trees, trees), rtol=1e-5)
    grads = jax.grad(lambda tree: algebra.gram_matrix(tree)[0, 1])(trees[0])
    np.testing.assert_allclose(grads, trees[0][::-1], rtol=1e-6)


def test_a_squared_norm_in_half_precision_is_summed_in_float32():
    found = algebra.squared_norm({"w": jnp.full(3, 300.0, jnp.float16)})
    assert (found.dtype, float(found)) == (jnp.float32, 270_000.0)


def test_large_numbers_are_finite_though_their_sum_is_not():
    assert algebra.all_finite({"a": jnp.full(3, 3e38), "b": jnp.full(3, -3e38)})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not algebra.all_finite({"a": jnp.ones(2), "b": jnp.array([1.0, bad])})
