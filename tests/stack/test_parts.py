"""Many examples in parts: the results are the same, and no array exceeds the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax import tasks
from eupmu_jax._stack import parts
from eupmu_jax.objectives import diffusion

WIDE = 1_000


@jax.jit
def wide(params, x, labels):
    """A function of each example that uses an array 1,000 times as large as the input."""
    return jnp.mean(jnp.sin(x[:, None] * params * jnp.arange(WIDE)) + labels[:, None], axis=1)


def longest_of(*args):
    """The number of examples that are passed to the function at once."""
    seen = []
    parts.in_parts(lambda params, x, labels: seen.append(len(x)) or wide(params, x, labels), *args)
    return seen[-1]


@pytest.mark.slow
@given(st.integers(1, 50), st.integers(1, 60))
def test_parts_give_the_results_of_the_whole(count, at_once):
    x, labels = jnp.linspace(-1, 1, count), jnp.arange(count) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LARGEST_BYTES", at_once * WIDE * x.dtype.itemsize)
        found = parts.in_parts(wide, 0.5, x, labels)
        assert longest_of(0.5, x, labels) <= max(1, at_once)
    np.testing.assert_allclose(found, wide(0.5, x, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_diffusion_model_is_measured_on_the_same_noise_whatever_the_size_of_parts(monkeypatch):
    # BUG: 500 images were passed at once, which take tens of gigabytes with Stable Diffusion; in smaller batches they
    # would have been given other times.
    denoise = lambda params, x_t, t, labels: x_t * params + jnp.sin(labels + t / 100)[:, None]
    make = lambda: tasks.diffusion(denoise, diffusion.cosine_schedule(100), num_conditions=3)
    batch = {"inputs": jnp.ones((13, 5)) / 2, "labels": jnp.arange(13) % 3}

    def figures():
        task = make()
        loss = lambda params: task.retain(task.outputs(params, batch, None), batch)
        return task.outputs(0.3, batch, None), task.unknown(0.3, batch)[0], jax.jit(jax.value_and_grad(loss))(0.3)

    whole = figures()
    monkeypatch.setattr(parts, "LARGEST_BYTES", 60)
    for found, wanted in zip(*map(jax.tree.leaves, (figures(), whole)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_parts_take_less_memory(monkeypatch):
    x, labels = jnp.ones(1_000), jnp.zeros(1_000)
    taken = lambda: jax.jit(lambda x: parts.in_parts(_network, 0.5, x, labels)).lower(x).compile().memory_analysis()
    whole = taken().temp_size_in_bytes
    monkeypatch.setattr(parts, "LARGEST_BYTES", 100_000)
    assert taken().temp_size_in_bytes < whole / 3


def _network(params, x, labels):
    # Matrix products are not fused with the operations around them.
    hidden = jnp.sin(x[:, None] * jnp.ones(500)) @ jnp.full((500, 500), params)
    return (jnp.sin(hidden) @ jnp.ones(500)) + labels
