"""A Flax model as a pure function of plain trees."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

# The default of Flax's BatchNorm.
EPSILON = 1e-5


def functional(model: nnx.Module) -> tuple[chex.ArrayTree, chex.ArrayTree, Callable]:
    """Splits a model into its parameters, its running statistics and a pure function of both.

    The function is `apply(params, batch_stats, images, train) -> (logits, batch_stats)`. With `train` true, BatchNorm
    normalises by the batch and the new running statistics are returned: `0.9 * old + 0.1 * batch` for the models of
    this package, with the biased variance of the batch (PyTorch uses the unbiased one). With `train` false, it
    normalises by the given statistics and returns them unchanged. Without BatchNorm, `batch_stats` is an empty dict and
    `train` has no effect.

    `apply` works under `jax.jit`, `jax.grad` (with `has_aux=True`), `jax.vmap` and `jax.lax.scan`; the statistics it
    returns have the structure, shapes and dtypes of those it took, so a loop over them compiles once. No gradient flows
    through them. Under `jax.vmap` over batches, each batch is normalised by itself and gives its own statistics.

    Args:
      model: A model whose state is parameters and running statistics. It is not modified, but the trees share its
        arrays, so a program that donates them deletes those of the model.

    Returns:
      `(params, batch_stats, apply)`. Both trees are nested dicts of arrays. `train` is a Python bool, static under
      `jax.jit`.

    Raises:
      ValueError: If the model has other state, such as the random keys of dropout.

    Cost: that of calling the model; merging and splitting modules in Python costs time only when tracing.

    Example:
      >>> from eupmu_jax.models import ResNet8
      >>> params, batch_stats, apply = functional(ResNet8(10, rngs=nnx.Rngs(0)))
      >>> step = jax.jit(apply, static_argnames="train")
      >>> logits, batch_stats = step(params, batch_stats, jnp.ones((2, 8, 8, 3)), train=True)
      >>> logits.shape, sorted(batch_stats)
      ((2, 10), ['blocks', 'norm'])
    """
    rest = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat)))
    if others := sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)}):
        raise ValueError(f"model may hold nnx.Param and nnx.BatchStat only, got {', '.join(others)}; take dropout out.")
    graphs = {
        train: nnx.graphdef(nnx.view(model, raise_if_not_found=False, use_running_average=not train))
        for train in (False, True)
    }

    def apply(params, batch_stats, images, train):
        merged = nnx.merge(graphs[bool(train)], params, batch_stats)
        logits = merged(images)
        updated = nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))
        return logits, jax.lax.stop_gradient(updated)

    params, batch_stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return params, batch_stats, apply


def fold(params: chex.ArrayTree, batch_stats: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    r"""Folds the running statistics of BatchNorm into its scale and bias; evaluation gives the same logits.

    .. math::
      \gamma' = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad \beta' = \beta - \mu \gamma'

    The remaining statistics are those of a layer that does not normalise, the same for every trained model. A
    classifier that is unlearned with fixed statistics is therefore a function of its parameters alone.

    Args:
      params, batch_stats: As from `functional`; layers normalise with :math:`\epsilon` = 1e-5, Flax's default.

    Returns:
      `(params, batch_stats)` of the same structures.

    Example:
      >>> layer = {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}
      >>> folded, _ = fold({"norm": layer}, {"norm": {"mean": jnp.array([2.0]), "var": jnp.array([9.0])}})
      >>> [round(float(folded["norm"][name][0]), 4) for name in ("scale", "bias")]
      [1.0, -1.0]
    """
    if set(batch_stats) == {"mean", "var"}:
        scale = params["scale"] / jnp.sqrt(batch_stats["var"] + EPSILON)
        folded = params | {"scale": scale, "bias": params["bias"] - batch_stats["mean"] * scale}
        neutral = {"mean": jnp.zeros_like(batch_stats["mean"]), "var": jnp.full_like(batch_stats["var"], 1 - EPSILON)}
        return folded, neutral
    parts = {name: fold(params[name], part) for name, part in batch_stats.items()}
    folded, neutral = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
    return params | folded, neutral
