"""The optimizer of few steps: Muon for matrices, Adam for the rest, a learning rate from the number of steps."""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.checks import check_int, check_number, check_real

MAX_NORM = 1.0
# Keys in the path of a leaf, in lower case: tables of vectors that are looked up, and projections of attention whose
# first axis alone is summed over.
_EMBEDDINGS = ("wte", "wpe")
_PROJECTIONS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "qkv")


def default_optimizer(
    params: chex.ArrayTree, steps: int | Sequence[int], *, length: chex.Numeric = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Clipping to norm 1, then Muon for matrices and Adam for all else, on a path of a stated length.

    .. math:: \eta_t = \frac{\ell}{T} \cdot \frac{1 + \cos(\pi t / T)}{2}, \qquad t = 0, \dots, T - 1

    Adam moves every weight by about the learning rate, whatever its gradient, so few large steps change a layer's
    outputs by as much as all its weights together. Muon moves a matrix `(in, out)` by about the learning rate times
    :math:`\max(1, \sqrt{out / in})` in the spectral norm, which bounds the change of its outputs. The rates of a run
    add up to :math:`\ell (1 + 1/T) / 2`, so about half of the length, times this factor, bounds the path of each matrix
    in the spectral norm, whatever the number of steps; each further round adds as much. The length 1 was picked on an
    MLP on Fashion-MNIST.

    Muon takes the momentum :math:`M = U \Sigma V^\top` of a matrix to about :math:`U V^\top`: five Newton-Schulz
    iterations bring singular values above a hundredth of M's Frobenius norm to between 0.68 and 1.21, and smaller ones
    to less. Vectors, scalars, biases and embeddings take Adam with Nesterov's momentum at the same learning rate, whose
    first step is 1.5 times as long. Which leaves are matrices, and how kernels with more axes are flattened, says
    `muon_dimensions`.

    Guarantees: a step is not proportional to the gradient. What a surgery says to first order holds for the direction
    that it hands over, not for the step; `utility_guard` corrects the step that is made. The first update of each
    matrix has a positive inner product with its gradient; later ones have it with the momentum, and perhaps not with
    the gradient. A small gradient makes no small step: the schedule alone brings the steps to an end.

    Cost: besides the gradient, five iterations of three matrix products for each matrix, at most
    :math:`30\, m^2 n` operations for sides :math:`m \le n`, next to :math:`6\, b\, m n` for a batch of b. State: one
    copy of the matrices, two of the rest. On a mesh, replicated matrices need no communication, and every device does
    the whole work. A matrix that is split along its longer side needs one all-reduce of its `(m, m)` Gram matrix in
    each iteration; split along its shorter side, all-gathers of that and, twice, of the whole matrix. The two norms,
    for clipping and before the first iteration, each take an all-reduce of one number.

    Computed in the dtype of the gradients, but in float32 for float16, in which the epsilon 1e-8 would be 0; state and
    updates are then float32 too, which `optax.apply_updates` casts to the parameters'. In bfloat16 the rounding errors
    of a gradient of low rank are singular values of M like others, and become steps of full size.

    ==================================  ================================================================
    leaf or gradient                    result
    ==================================  ================================================================
    no matrices, or nothing else        Adam alone, or Muon alone
    tree without leaves, None leaves    kept as they are, as by optax
    gradient zero from the start        update 0; later on, the momentum still moves the leaf
    rank below the shorter side         only the part in M's row and column space moves (float32)
    momentum's norm far below 1e-8      a matrix moves by less, down to 0
    a gradient not finite               NaN, also in the state; `skip_nonfinite` refuses such steps
    more than `steps` steps             updates 0
    ==================================  ================================================================

    Args:
      params: Parameters; any pytree, such as those of Flax NNX, Linen or Haiku. Read only for the check below; None
        leaves it out. Paths and ranks are taken from what `init` and `update` get, which may be a part of the tree.
      steps: Steps of the run, at least 1; or those of successive rounds, each with a cosine of its own.
      length: Learning rate at the start times steps, finite and above 0.

    Returns:
      A transform that ends with the learning rate, for the end of any chain.

    Raises:
      ValueError: For fewer than one step, or a number of steps that is no int; no rounds; a length that is not finite
        and above 0; complex parameters.

    Source: Muon, Jordan et al. (2024); its use on large models, Liu et al. (2025), arXiv 2502.16982, whose scaling to
    the size of Adam's updates is not used here.

    >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    >>> optimizer = default_optimizer(params, steps=10)
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> bool(jnp.linalg.norm(updates["kernel"], 2) < 0.13), updates["bias"].shape
    (True, (3,))
    """
    check_real("params", params)
    schedule = cosine_rounds(steps, length)
    muon = optax.contrib.muon(schedule, muon_weight_dimension_numbers=muon_dimensions, adam_learning_rate=schedule)
    return wide_enough(optax.chain(optax.clip_by_global_norm(MAX_NORM), muon))


def cosine_rounds(steps: int | Sequence[int], length: chex.Numeric = 1.0) -> optax.Schedule:
    """The learning rate of `default_optimizer`.

    >>> schedule = cosine_rounds([2, 4])
    >>> [round(float(schedule(count)), 3) for count in range(7)]
    [0.5, 0.25, 0.25, 0.213, 0.125, 0.037, 0.0]
    """
    rounds = [steps] if isinstance(steps, int) or not isinstance(steps, Sequence) else list(steps)
    for count in rounds:
        check_int("steps", count, 1, static=True)
    if not rounds:
        raise ValueError("steps: got no rounds, expected at least one")
    check_number("length", length, above=0, finite=True)
    cosines = [optax.cosine_decay_schedule(length / count, count) for count in rounds]
    boundaries = [sum(rounds[: k + 1]) for k in range(len(rounds) - 1)]
    return optax.join_schedules(cosines, boundaries)


def muon_direction(beta: chex.Numeric = 0.95) -> optax.GradientTransformation:
    """Muon and Adam without a learning rate, in the sign of the gradient, for chains that end with one."""
    muon = optax.contrib.muon(1.0, beta=beta, muon_weight_dimension_numbers=muon_dimensions, adam_learning_rate=1.0)
    return optax.chain(muon, optax.scale(-1.0))


def wide_enough(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer in float32 if parameters are float16, in which the epsilon of Adam and Muon would be 0.

    >>> tx, w = wide_enough(optax.adam(0.1)), jnp.zeros(2, jnp.float16)
    >>> tx.update(w, tx.init(w), w)[0].tolist()
    [-0.0, -0.0]
    """
    optimizer = optax.with_extra_args_support(optimizer)
    wide = lambda leaf: leaf.astype(jnp.float32) if getattr(leaf, "dtype", None) == jnp.float16 else leaf
    widened = lambda tree: jax.tree.map(wide, tree)

    def update(updates, state, params=None, **extra_args):
        return optimizer.update(widened(updates), state, widened(params), **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: optimizer.init(widened(params)), update)


def muon_dimensions(params: chex.ArrayTree) -> chex.ArrayTree:
    """How Muon flattens each leaf into a matrix: a tree like `params`, with None for leaves that take Adam.

    The first that applies, with keys in lower case:

    ===============================================  =============================================
    leaf                                             its rows; its columns
    ===============================================  =============================================
    fewer than two axes, or no elements              None
    a key contains "embed", or is "wte" or "wpe"     None
    its own key is "bias"                            None
    3 axes or more, and a key "query", "key",        first axis; all others
    "value", "q_proj", "k_proj", "v_proj", "qkv"
    all else                                         all axes but the last; last axis
    ===============================================  =============================================

    The last row fits dense kernels `(in, out)`, convolutions `(height, width, in, out)`, output projections
    `(heads, size, out)` and the factors of LoRA. A leaf with more than two axes that makes one row only, such as the
    scales `(1, 1, 1, out)` of Haiku's normalization, takes Adam, and no projection has a first axis of 1, as 1 x 1
    convolutions of that name do. Not seen: layers stacked along a first axis, as by `nn.scan`, which make one matrix
    together, and the layouts of other libraries, such as `(out, in, height, width)`.

    It may be passed as `muon_weight_dimension_numbers`: optax then calls it with whatever tree `init` and `update` get.

    >>> found = muon_dimensions({"conv": jnp.zeros((3, 3, 8, 16)), "scale": jnp.zeros(16)})
    >>> found["conv"].reduction_axis, found["conv"].output_axis, found["scale"]
    ((0, 1, 2), (3,), None)
    """
    return jax.tree_util.tree_map_with_path(_dimensions_of, params)


def _dimensions_of(path, leaf):
    keys = _names(path)
    shape = np.shape(leaf)
    is_table = any("embed" in key or key in _EMBEDDINGS for key in keys)
    if len(shape) < 2 or 0 in shape or is_table or keys[-1:] == ["bias"]:
        return None
    axes = tuple(range(len(shape)))
    is_projection = len(shape) > 2 and shape[0] > 1 and any(key in _PROJECTIONS for key in keys)
    split = 1 if is_projection else len(shape) - 1
    if len(shape) > 2 and math.prod(shape[:split]) == 1:
        return None
    return optax.contrib.MuonDimensionNumbers(axes[:split], axes[split:])


def _names(path) -> list[str]:
    """The keys of a path in lower case; the parts of a module's path, which Haiku joins by "/", are keys too."""
    # The array of an NNX variable is its attribute `value`, which is no projection.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    keys = (getattr(part, "key", getattr(part, "name", getattr(part, "idx", ""))) for part in path)
    return [name for key in keys for name in str(key).lower().split("/")]
