"""Low-rank adapters: few parameters to unlearn with, and the model itself as it was."""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from eupmu_jax.models.language.adapter import LanguageModel, from_parts


def with_lora(
    model: LanguageModel, params: chex.ArrayTree, rank: int, *, alpha: float | None = None, key: chex.PRNGKey
) -> LanguageModel:
    r"""A model whose only parameters are low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by qwix.

    .. math:: W' = W + \frac{\alpha}{r} A B

    for every matrix of attention and MLP in every block. At first B is zero, so the model computes what it computed.
    Only the adapters are parameters; those of the model are closed over.

    What a function closes over, `jax.jit` copies into each program that it compiles, where XLA may work on it for
    minutes. Of a real model, have it passed in instead: set JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 in the environment.
    JAX reads it as it is imported; `jax.config.update` is too late.

    Args:
      model: As from the loaders or `from_tunix`.
      params: Of that model, unlearned or not.
      rank: r, at least 1.
      alpha: Scale; without one, the rank.
      key: Of A.

    Returns:
      The model of the adapters, whose `params` are for every function of this library what the whole would be.

    Raises:
      ImportError: Without the extra `language`.
      ValueError: If the rank is below 1.

    >>> with_lora(None, None, 0, key=None)
    Traceback (most recent call last):
    ValueError: rank: got 0, expected at least 1
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    try:
        import qwix
    except ImportError as error:
        raise ImportError("adapters need qwix: pip install 'eupmu-jax[language]'") from error
    # The embedding has no adapter: qwix does not find it where it is also the output layer.
    provider = qwix.LoraProvider(module_path="layers/.*", rank=rank, alpha=float(rank if alpha is None else alpha))

    def adapted(params, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        call = (tokens, tokens, None, jnp.ones((1, 1, 1), bool))
        return qwix.apply_lora_to_model(model.module(params), provider, *call, rngs=nnx.Rngs(params=key))

    # What qwix would make is only looked at: a run of it, for so many matrices, compiles for a minute.
    shapes = nnx.eval_shape(adapted, params, key)
    draw = jax.nn.initializers.he_uniform()
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(shapes, nnx.LoRAParam)))
    adapters = [
        draw(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        if path[-1].key.endswith("_lora_a")
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, (path, leaf) in enumerate(leaves)
    ]
    fixed = nnx.state(model.module(params))
    return from_parts(
        nnx.graphdef(shapes), jax.tree.unflatten(structure, adapters), (fixed,), shapes.config, model.context
    )
