"""Low-rank adapters: few parameters to unlearn with, while the model itself stays unchanged."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from eupmu_jax._stack.checks import check_int, check_number, check_same_shapes
from eupmu_jax.models.language.adapter import LanguageModel, from_parts

# Kernels of google-tunix's Gemma, whose inputs are the second last axis, after stack and heads.
_HEADS_FIRST = {"q_einsum", "kv_einsum", "qkv_einsum"}


def with_lora(
    model: LanguageModel, params: chex.ArrayTree, rank: int, *, alpha: float | None = None, key: chex.PRNGKey
) -> LanguageModel:
    r"""A model whose only parameters are low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by qwix.

    .. math:: W' = W + \frac{\alpha}{r} A B

    for every attention and MLP matrix in every block. B starts at zero, so at first the model computes the same as
    before. Only the adapters are parameters; the weights of the model are closed over. `merge_lora` adds the adapters
    to those weights, for other programs.

    `jax.jit` copies what a function closes over into each program that it compiles, where XLA may spend minutes on it.
    For a model of real size, set JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 in the environment, so that JAX passes it as an
    argument instead. JAX reads the variable when it is imported; `jax.config.update` is too late.

    Args:
      model: A model from the loaders or `from_tunix`.
      params: Parameters of that model, unlearned or not, in any layout on a mesh.
      rank: r, at least 1.
      alpha: The scale; by default the rank.
      key: Key for A.

    Returns:
      The model with adapters. Every function of this library takes its `params` in place of those of a whole model.
      They are at least float32: in bfloat16 most numbers of A are too large for a step of Adam to change them.

    Raises:
      ImportError: Without the extra `language`.
      ValueError: If the rank is below 1, alpha is not a finite number, the model has adapters already, or the
        parameters are not of its structure and shapes.

    >>> with_lora(None, None, 0, key=None)
    Traceback (most recent call last):
    ValueError: rank: got 0, expected an int of at least 1
    """
    check_int("rank", rank, 1, static=True)
    if alpha is not None:
        check_number("alpha", alpha, finite=True)
    if any("_lora_" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)):
        raise ValueError("model: got one with adapters, expected the model without them")
    check_same_shapes("params", params, "model.params", model.params)
    try:
        import qwix
    except ImportError as error:
        raise ImportError("adapters need qwix: pip install 'eupmu-jax[language]'") from error
    # The embedding gets no adapter: qwix does not find it if it is also the output layer.
    provider = qwix.LoraProvider(module_path="layers/.*", rank=rank, alpha=float(rank if alpha is None else alpha))

    def adapted(params, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        call = (tokens, tokens, None, jnp.ones((1, 1, 1), bool))
        return qwix.apply_lora_to_model(model.module(params), provider, *call, rngs=nnx.Rngs(params=key))

    # Only the shapes that qwix would create are taken: running it compiles for a minute with so many matrices.
    shapes = nnx.eval_shape(adapted, params, key)
    draw, wide = jax.nn.initializers.he_uniform(), lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(shapes, nnx.LoRAParam)))
    adapters = [
        draw(jax.random.fold_in(key, i), leaf.shape, wide(leaf))
        if path[-1].key.endswith("_lora_a")
        else jnp.zeros(leaf.shape, wide(leaf))
        for i, (path, leaf) in enumerate(leaves)
    ]
    fixed = nnx.state(model.module(params))
    return from_parts(
        nnx.graphdef(shapes), jax.tree.unflatten(structure, adapters), (fixed,), shapes.config, model.context
    )


def merge_lora(params: chex.ArrayTree, adapters: chex.ArrayTree, alpha: float | None = None) -> dict:
    r"""The parameters of the whole model with its adapters added, :math:`W + \frac{\alpha}{r} A B`.

    They are for anything that reads a model's own parameters, such as other programs and `metrics.rounded`. With them
    the model without adapters computes the same as the model with adapters, up to rounding to the dtype of W.

    Args:
      params: The parameters passed to `with_lora`.
      adapters: Adapters like `with_lora(...).params`, trained or not.
      alpha: The value passed to `with_lora`; by default the rank.

    Returns:
      Parameters in the structure of `params`; those without an adapter are the same arrays.

    Raises:
      ValueError: For adapters that do not belong to the parameters.

    >>> params = {"gate_proj": {"kernel": jnp.zeros((2, 2))}}
    >>> pair = {"kernel_lora_a": jnp.array([[1.0], [2.0]]), "kernel_lora_b": jnp.array([[3.0, 4.0]])}
    >>> merge_lora(params, {"gate_proj": pair}, alpha=10)["gate_proj"]["kernel"].tolist()
    [[30.0, 40.0], [60.0, 80.0]]
    """
    for name, tree in (("params", params), ("adapters", adapters)):
        if not isinstance(tree, Mapping):
            raise ValueError(f"{name}: got a {type(tree).__name__}, expected the nested dicts of a model's params")
    whole, given = flatten_dict(params, keep_empty_nodes=True), flatten_dict(adapters)
    if not given:
        raise ValueError("adapters: got none, expected those of `with_lora`")
    for *path, name in dict.fromkeys((*path, str(name).rpartition("_lora_")[0]) for *path, name in given):
        a, b = (given.get((*path, f"{name}_lora_{part}")) for part in "ab")
        if (*path, name) not in whole or a is None or b is None:
            found = ", ".join(".".join(map(str, other)) for other in given if list(other[:-1]) == path)
            raise ValueError(f"adapters: got {found}, expected a pair for a matrix of the parameters")
        whole[*path, name] = _merged((*path, name), whole[*path, name], a, b, alpha)
    return unflatten_dict(whole)


def _merged(place, weights, a, b, alpha):
    # A has the inputs before the rank and B the outputs after it, both in the order of the weights.
    heads_first = _HEADS_FIRST & set(place)
    inputs_first = jnp.moveaxis(weights, -2, 0) if heads_first else weights
    if a.shape[-1:] != b.shape[:1] or (*a.shape[:-1], *b.shape[1:]) != inputs_first.shape:
        where = ".".join(map(str, place))
        raise ValueError(
            f"adapters: got {a.shape} and {b.shape} for {where} of shape {weights.shape}, expected those of its model"
        )
    if alpha is not None:
        check_number("alpha", alpha, finite=True)
    rank, wide = a.shape[-1], jnp.promote_types(weights.dtype, jnp.float32)
    product = jnp.tensordot(a.astype(wide), b.astype(wide), 1, precision="highest")
    merged = inputs_first + (rank if alpha is None else alpha) / rank * product
    return (jnp.moveaxis(merged, 0, -2) if heads_first else merged).astype(weights.dtype)
