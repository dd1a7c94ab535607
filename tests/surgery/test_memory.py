"""The temporary memory of compiled steps, in copies of the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from eupmu_jax import explicit_step, unilateral_surgery
from eupmu_jax.models import Decoder, DecoderSize
from eupmu_jax.surgery.two_pass import two_pass

pytestmark = pytest.mark.slow


def temporary_copies(size, make):
    """The temporary memory of a compiled step of a scanned decoder, in copies of its parameters."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(size, rngs=nnx.Rngs(0))), nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    init, step = make(loss)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    batches = ({"x": tokens, "y": tokens},) * 2
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(init, params), batches).compile()
    copy = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    return compiled.memory_analysis().temp_size_in_bytes / copy


def plain(loss):
    def step(params, state, batches):
        whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        grads = jax.grad(lambda params: jax.vmap(lambda batch: loss(params, batch))(whole).mean())(params)
        updates, state = optax.adam(0.02).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optax.adam(0.02).init, step


def explicit(loss):
    chain = optax.chain(unilateral_surgery(), optax.adam(0.02))
    return chain.init, explicit_step(loss, chain, mode="vmap")


def two_passes(loss):
    return two_pass(loss, optax.adam(0.02))


def test_a_stack_and_two_passes_hold_one_gradient_more_than_a_plain_step():
    size = DecoderSize(vocab=64, width=256, layers=8, heads=4, kv_heads=2, hidden=512, tied=True)
    # Sequences are short, so that gradients dominate.
    once = temporary_copies(size, plain)
    stack = temporary_copies(size, explicit)
    twice = temporary_copies(size, two_passes)
    assert 1 < once < 1.5
    assert stack < once + 1.1
    # The loops of both passes start from zeros. On a CPU, those of the second are allocated during the first.
    assert twice < once + 1.2
