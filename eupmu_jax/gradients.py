"""Gradients of several objectives from one backward pass: stacked for explicit surgery, weighted for implicit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

# Added inside every logarithm of a loss, as the released EUPMU code does: it caps the weight of a vanishing loss.
LOG_OFFSET = 1e-8


class SharedForward(NamedTuple):
    """Objectives that share one model forward and differ in their loss heads; see `shared_forward`."""

    forward: Callable
    heads: tuple[Callable, ...]


Loss = Callable | Sequence[Callable] | SharedForward


def shared_forward(forward: Callable, heads: Sequence[Callable]) -> SharedForward:
    """Describes K objectives that differ only after the model's forward pass, so that one vmapped pass serves all.

    A plain sequence of K loss functions repeats the model K times in the program. Split them where they differ instead:
    the heads are cheap, and every objective evaluates all of them and selects its own.

    Args:
      forward: `forward(params, batch, *args) -> outputs`, the same for all objectives.
      heads: K functions `head(outputs, batch) -> loss` (or `(loss, aux)`), forget first. Each must be finite, with
        finite gradients, on the other objectives' batches too, since an unselected NaN still poisons a gradient.

    Returns:
      A value to pass as `loss` wherever this library takes one.

    >>> loss = shared_forward(lambda params, x: params * x, [lambda y, x: -y.mean(), lambda y, x: (y**2).mean()])
    >>> losses, grads = stacked_value_and_grad(loss)(2.0, stack_objectives(jnp.ones(3), jnp.ones(3)))
    >>> losses.tolist(), grads.tolist()
    ([-2.0, 4.0], [-1.0, 4.0])
    """
    return SharedForward(forward, tuple(heads))


def stack_objectives(*batches: chex.ArrayTree) -> chex.ArrayTree:
    """Stacks K batches of equal shapes into one tree with a leading objective axis, the forget batch first.

    Args:
      *batches: K >= 2 pytrees of one structure, equal in every leaf's shape. PRNG keys may be leaves.

    Returns:
      The pytree with every leaf of shape `(K, *leaf.shape)`.

    Raises:
      ValueError: For fewer than two batches, or structures or shapes that differ. Batches of different sizes need no
        stacking: pass them as a tuple to the functions of this module.

    >>> stack_objectives({"x": jnp.zeros((8, 3))}, {"x": jnp.ones((8, 3))})["x"].shape
    (2, 8, 3)
    """
    _check_batches(batches)
    if not _same_shapes(batches):
        shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
        raise ValueError(
            f"batches: got shapes {', '.join(map(str, shapes))}, expected equal ones; pass batches of different sizes "
            "as a tuple instead of stacking them"
        )
    return _stack(batches)


def stacked_value_and_grad(loss: Loss, *, has_aux: bool = False, mode: str = "auto") -> Callable:
    r"""Losses and gradients of every objective, in one backward pass over all examples.

    Returns `value_and_grad(params, batches, *args) -> (losses, grads)` with :math:`losses_k = l_k(\theta)` of shape
    `(K,)` and gradient leaves :math:`g_k = \nabla l_k(\theta)` stacked to `(K, *param.shape)`. Like
    `jax.value_and_grad` it is not jitted; call it inside the jitted step.

    Batches come stacked (see `stack_objectives`), or as a tuple of K batches, whose sizes may differ: nine retain
    examples for each forget example, say. `args` (a key, model state) are passed to every objective unchanged.

    Modes:

    * `"vmap"`: one vmapped backward pass, the parameters shared. Batches of different sizes, which vmap would have to
      pad, and plain sequences of losses, which have no common program, are unrolled in the same jitted program; the
      cost is one pass over all examples in every case.
    * `"unroll"`: one backward pass for each objective, side by side in one program.
    * `"auto"`: unroll on CPU, where large matrix products fill the cores one by one and a vmapped convolution becomes a
      grouped one, many times slower; vmap on accelerators, where fewer and larger kernels win.

    Mutable model state (BatchNorm statistics) goes in through `args` or the batch and comes out through `aux`, with an
    objective axis, since every objective normalises with the statistics of its own batch. Keep the retain row,
    `jax.tree.map(lambda leaf: leaf[1], aux)`: the deployed model sees retained data. To leave the statistics alone,
    call the model in evaluation mode.

    Args:
      loss: `loss(params, batch, *args) -> scalar` shared by all objectives; or a sequence of K such functions, forget
        first; or a `shared_forward` for losses that differ only in their heads. Everything is minimised.
      has_aux: If true, losses return `(scalar, aux)` and the result is `((losses, aux), grads)`; aux leaves gain the
        objective axis.
      mode: `"vmap"`, `"unroll"` or `"auto"`.

    Raises:
      ValueError: For an unknown mode, fewer than two objectives, batches of different structures, leaves without a
        common objective axis, a number of losses or heads other than K, or a tuple of bare arrays of equal shape that
        could be either a stacked batch or a batch for each objective.

    >>> loss = lambda params, batch: jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> forget = {"x": jnp.ones((4, 3)), "y": jnp.zeros(4)}
    >>> retain = {"x": jnp.ones((36, 3)), "y": jnp.ones(36)}
    >>> losses, grads = stacked_value_and_grad(loss)(jnp.ones(3), (forget, retain))
    >>> losses.tolist(), grads.shape
    ([9.0, 4.0], (2, 3))
    """
    if mode not in ("vmap", "unroll", "auto"):
        raise ValueError(f"mode: got {mode!r}, expected 'vmap', 'unroll' or 'auto'")

    def value_and_grad(params, batches, *args):
        objectives = _Objectives(loss, batches, args)

        def unrolled(params):
            results = [
                jax.value_and_grad(lambda p, k=k: objectives.evaluate(k, p), has_aux=has_aux)(params)
                for k in range(objectives.count)
            ]
            return _stack(results)

        def vmapped(params):
            return objectives.vmap(lambda evaluate: jax.value_and_grad(evaluate, has_aux=has_aux)(params))

        return vmapped(params) if objectives.prefers_vmap(mode) else unrolled(params)

    return value_and_grad


def scalarized_value_and_grad(loss: Loss, *, has_aux: bool = False, loss_scale: str = "raw") -> Callable:
    r"""Losses of every objective and the gradient of their weighted sum, in one backward pass.

    Returns `value_and_grad(params, batches, multipliers, *args) -> (losses, grads)` with `losses` `(K,)`, unweighted,
    and gradients of the parameters' shapes,

    .. math::
      \nabla\Big(l_0 + \sum_k \lambda_k l_k\Big) \;\text{("raw")} \qquad
      \nabla\Big(\log(l_0 + \delta) + \sum_k \lambda_k \log(l_k + \delta)\Big) \;\text{("log")},\quad \delta = 10^{-8}

    Multipliers are constants of the differentiation, and negative ones weigh 0. In log scale all losses must be
    positive; one that is not makes the gradients NaN: `implicit_surgery` names it, or inside jit refuses the step.

    Args:
      loss, has_aux: As in `stacked_value_and_grad`; so are the batches.
      loss_scale: `"raw"` or `"log"`.

    Raises:
      ValueError: As `stacked_value_and_grad`; also for an unknown scale, or multipliers of another shape than `(K-1,)`.

    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> batches = stack_objectives(jnp.array([[1.0]]), jnp.array([[3.0]]))
    >>> losses, grads = scalarized_value_and_grad(loss)(jnp.array(0.0), batches, jnp.array([0.5]))
    >>> losses.tolist(), grads.tolist()
    ([1.0, 9.0], -5.0)
    """
    check_loss_scale(loss_scale)

    def value_and_grad(params, batches, multipliers, *args):
        objectives = _Objectives(loss, batches, args)
        multipliers = jnp.asarray(multipliers)
        if multipliers.shape not in ((objectives.count - 1,), () if objectives.count == 2 else None):
            raise ValueError(
                f"multipliers: got shape {multipliers.shape}, expected ({objectives.count - 1},): one for each retain "
                "constraint"
            )

        def total(params):
            losses, aux = objectives.values(params, has_aux)
            weights = jnp.concatenate([jnp.ones(1), jnp.maximum(multipliers, 0).reshape(-1)]).astype(losses.dtype)
            if loss_scale == "log":
                positive = losses > 0
                weights = jnp.where(positive, weights / (jnp.where(positive, losses, 1) + LOG_OFFSET), jnp.nan)
            return jnp.sum(jax.lax.stop_gradient(weights) * losses), (losses, aux)

        (_, (losses, aux)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


def retain_losses(loss: Loss, params: chex.ArrayTree, batches: Any, *args, has_aux: bool = False) -> chex.Array:
    """Losses of the retain objectives alone, `(K-1,)`, without gradients; what the model returns besides is dropped.

    This is the `value_fn` of `implicit_surgery`, given the batches and `args` of the step. Arguments are those of
    `scalarized_value_and_grad`.

    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> retain_losses(loss, jnp.array(0.0), (jnp.ones(2), jnp.full(6, 3.0))).tolist()
    [9.0]
    """
    return _Objectives(loss, batches, args).values(params, has_aux, start=1)[0]


def check_loss_scale(loss_scale: str) -> None:
    """Raises `ValueError` unless `loss_scale` is "raw" or "log"."""
    if loss_scale not in ("raw", "log"):
        raise ValueError(f"loss_scale: got {loss_scale!r}, expected 'raw' or 'log'")


def check_positive(losses: chex.Array, step: chex.Numeric) -> None:
    """Raises `ValueError` if a loss of log scale is not positive, saying which and when; silent on traced values."""
    if isinstance(losses, jax.core.Tracer) or isinstance(step, jax.core.Tracer):
        return
    for k, value in enumerate(losses):
        if value <= 0:
            name = "forget" if k == 0 else "retain"
            raise ValueError(
                f"losses: got losses[{k}] = {float(value):g} at step {int(step)} ({name}), expected a "
                "positive loss in log scale; use loss_scale='raw' or a forget loss that is bounded below by 0"
            )


class _Objectives:
    """K objectives on their batches, in whichever form either came."""

    def __init__(self, loss, batches, args):
        self.loss, self.args = loss, args
        functions = loss.heads if isinstance(loss, SharedForward) else (None if callable(loss) else tuple(loss))
        expected = None if functions is None else len(functions)
        if _is_tuple_of_batches(batches, expected):
            _check_batches(batches)
            self.count = len(batches)
            self.batches = list(batches)
            self.stacked = _stack(batches) if _same_shapes(batches) else None
        else:
            self.count = _leading_axis(batches)
            self.batches = [jax.tree.map(lambda leaf, k=k: leaf[k], batches) for k in range(self.count)]
            self.stacked = batches
        if expected is not None and expected != self.count:
            raise ValueError(
                f"loss: got {expected} functions for {self.count} batches, expected one for each objective"
            )
        self.vmappable = self.stacked is not None and (callable(loss) or isinstance(loss, SharedForward))

    def prefers_vmap(self, mode="auto"):
        return self.vmappable and (mode == "vmap" or (mode == "auto" and jax.default_backend() != "cpu"))

    def rebuilt_args(self):
        # Flax NNX variables can only be changed in the trace that made them, so each evaluation makes its own.
        return jax.tree.map(lambda leaf: leaf, self.args)

    def evaluate(self, k, params):
        args = self.rebuilt_args()
        if isinstance(self.loss, SharedForward):
            return self.loss.heads[k](self.loss.forward(params, self.batches[k], *args), self.batches[k])
        function = self.loss if callable(self.loss) else self.loss[k]
        return function(params, self.batches[k], *args)

    def vmap(self, transform, start=0):
        """Vmaps `transform`, a function of `evaluate(params)`, over the objectives from `start` on."""

        def one(index, batch):
            if isinstance(self.loss, SharedForward):
                shared: SharedForward = self.loss
                return transform(
                    lambda p: jax.lax.switch(index, shared.heads, shared.forward(p, batch, *self.rebuilt_args()), batch)
                )
            return transform(lambda p: self.loss(p, batch, *self.rebuilt_args()))

        batches = jax.tree.map(lambda leaf: leaf[start:], self.stacked)
        return jax.vmap(one)(jnp.arange(start, self.count), batches)

    def values(self, params, has_aux, start=0):
        if self.prefers_vmap() and self.count - start > 1:
            result = self.vmap(lambda evaluate: evaluate(params), start)
        else:
            result = _stack([self.evaluate(k, params) for k in range(start, self.count)])
        return result if has_aux else (result, None)


def _is_tuple_of_batches(batches, expected):
    """Whether `batches` is a tuple or list of K batches rather than a stacked batch that happens to be one."""
    if type(batches) not in (tuple, list):
        return False
    bare = [jax.tree_util.treedef_is_leaf(jax.tree.structure(batch)) for batch in batches]
    if not any(bare):
        return True
    if not all(bare):
        return False
    arrays = [jnp.asarray(batch) for batch in batches]
    if len({(a.ndim, a.shape[1:], a.dtype) for a in arrays}) > 1:
        return False
    leading = {a.shape[:1] for a in arrays}
    length = leading.pop()[0] if len(leading) == 1 and arrays[0].ndim else None
    if length is None or length < 2 or (expected is not None and length != expected):
        return True
    if expected is not None and len(batches) != expected:
        return False
    raise ValueError(
        f"batches: {len(batches)} arrays of shape {arrays[0].shape} may be one stacked batch of {length} objectives or "
        f"{len(batches)} batches; stack the batches with stack_objectives, or make the stacked batch a dict"
    )


def _check_batches(batches):
    if len(batches) < 2:
        raise ValueError(
            f"batches: got K = {len(batches)}, expected K >= 2: the forget batch and at least one retain batch"
        )
    structures: list[Any] = [jax.tree.structure(batch) for batch in batches]
    for k, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"batches: batch {k} has structure {structure}, batch 0 has {structures[0]}; expected the same for all "
                "objectives"
            )


def _leading_axis(batches):
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"batches: leaves have shapes {shapes or 'of no leaf'}, expected one leading objective axis K in all of "
            "them (stack_objectives makes it), or a tuple of K batches"
        )
    (count,) = lengths
    if count < 2:
        raise ValueError(f"batches: got K = {count}, expected K >= 2: a forget batch and at least one retain batch")
    return count


def _same_shapes(batches):
    described = [[(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)] for batch in batches]
    return all(other == described[0] for other in described)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
