import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eupmu_jax.models.language import load_huggingface, with_lora

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")
pytest.importorskip("qwix", reason="needs qwix, of the extra `language`")

RANK, ALPHA = 3, 6.0


def names(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def merged(params, adapters):
    """The model's parameters with the adapters added to them."""
    if not isinstance(params, dict):
        return params
    found = {name: merged(part, adapters.get(name, {})) for name, part in params.items()}
    for name in {"w", "kernel"} & set(params):
        if f"{name}_lora_a" in adapters:
            pair = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
            found[name] = params[name] + ALPHA / RANK * jnp.tensordot(*pair, 1)
    return found


def test_adapters_add_low_rank_matrices_and_nothing_at_first(write, language):
    base = load_huggingface(write("llama"))
    model = with_lora(base, base.params, RANK, alpha=ALPHA, key=jax.random.key(0))
    # Seven matrices in each of two blocks.
    assert len(jax.tree.leaves(model.params)) == 2 * 7 * 2
    tokens, apply = jnp.asarray(language.tokens), jax.jit(base.apply)

    @jax.jit
    def step(adapters):
        losses = lambda adapters: (jnp.mean(model.apply(adapters, tokens) ** 2), model.apply(adapters, tokens))
        return jax.value_and_grad(losses, has_aux=True)(adapters)

    (_, logits), grads = step(model.params)
    np.testing.assert_allclose(logits, apply(base.params, tokens), atol=1e-5)
    # As B is zero, A has no gradient yet.
    for name, leaf in names(grads).items():
        assert bool(jnp.any(leaf)) == ("_lora_b" in name), name
    trained = optax.apply_updates(model.params, jax.tree.map(lambda grad: -5 * grad, grads))
    (_, logits), grads = step(trained)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(grads))
    expected = apply(merged(base.params, trained), tokens)
    assert np.abs(expected - apply(base.params, tokens)).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_every_block_of_gemma_has_adapters(write):
    base = load_huggingface(write("gemma2"))
    model = with_lora(base, base.params, RANK, key=jax.random.key(0))
    assert len(jax.tree.leaves(model.params)) == base.layers * 6 * 2
