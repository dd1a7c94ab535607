"""K objectives and their batches, in every form that is accepted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


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

    >>> from eupmu_jax.gradients.value_and_grad import stacked_value_and_grad
    >>> loss = shared_forward(lambda params, x: params * x, [lambda y, x: -y.mean(), lambda y, x: (y**2).mean()])
    >>> losses, grads = stacked_value_and_grad(loss)(2.0, stack_objectives(jnp.ones(3), jnp.ones(3)))
    >>> losses.tolist(), grads.tolist()
    ([-2.0, 4.0], [-1.0, 4.0])
    """
    return SharedForward(forward, tuple(heads))


def stack_objectives(*batches: chex.ArrayTree) -> chex.ArrayTree:
    """Stacks K batches of equal shapes into one tree with a leading objective axis, the forget batch first.

    Args:
      *batches: K >= 2 pytrees of the same structure and leaf shapes. PRNG keys may be leaves.

    Returns:
      The pytree with every leaf of shape `(K, *leaf.shape)`.

    Raises:
      ValueError: For fewer than two batches, or structures or shapes that differ. Batches of different sizes need no
        stacking: pass them as a tuple to the functions of `gradients.value_and_grad`.

    >>> stack_objectives({"x": jnp.zeros((8, 3))}, {"x": jnp.ones((8, 3))})["x"].shape
    (2, 8, 3)
    """
    _check_batches(batches)
    if not _same_shapes(batches):
        shapes = [jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{jnp.shape(leaf)}", batch) for batch in batches]
        raise ValueError(
            f"batches: got shapes {', '.join(map(str, shapes))}, expected equal ones; pass batches of different sizes "
            "as a tuple instead of stacking them"
        )
    return stack(batches)


class Objectives:
    """K objectives on their batches, in any of the accepted forms."""

    def __init__(self, loss, batches, args, has_aux=False):
        self.loss, self.args, self.has_aux = loss, args, has_aux
        functions = loss.heads if isinstance(loss, SharedForward) else (None if callable(loss) else tuple(loss))
        expected = None if functions is None else len(functions)
        if _is_tuple_of_batches(batches, expected):
            _check_batches(batches)
            self.count = len(batches)
            self.batches = list(batches)
            self.stacked = stack(batches) if _same_shapes(batches) else None
        else:
            self.count = _leading_axis(batches)
            self.batches = [jax.tree.map(lambda leaf, k=k: leaf[k], batches) for k in range(self.count)]
            self.stacked = batches
        if expected is not None and expected != self.count:
            raise ValueError(
                f"loss: got {expected} functions for {self.count} batches, expected one for each objective; pass "
                "the batches as one argument, a tuple with a batch for each objective"
            )
        self.vmappable = self.stacked is not None and (callable(loss) or isinstance(loss, SharedForward))

    def prefers_vmap(self, mode: str = "auto") -> bool:
        """Whether one vmapped program serves all objectives, and `mode` or the backend asks for it."""
        return self.vmappable and (mode == "vmap" or (mode == "auto" and jax.default_backend() != "cpu"))

    def _rebuilt_args(self):
        # Flax NNX variables can only be changed in the trace that created them, so each evaluation creates its own.
        return jax.tree.map(lambda leaf: leaf, self.args)

    def evaluate(self, k: int, params: chex.ArrayTree):
        """What objective k's loss returns."""
        args = self._rebuilt_args()
        if isinstance(self.loss, SharedForward):
            result = self.loss.heads[k](self.loss.forward(params, self.batches[k], *args), self.batches[k])
        else:
            function = self.loss if callable(self.loss) else self.loss[k]
            result = function(params, self.batches[k], *args)
        return _checked(result, self.has_aux)

    def vmap(self, transform, start=0):
        """Vmaps `transform`, a function of `evaluate(params)`, over the objectives from `start` on."""

        def one(index, batch):
            def evaluate(params):
                args = self._rebuilt_args()
                if isinstance(self.loss, SharedForward):
                    outputs = self.loss.forward(params, batch, *args)
                    return _checked(jax.lax.switch(index, self.loss.heads, outputs, batch), self.has_aux)
                return _checked(self.loss(params, batch, *args), self.has_aux)

            return transform(evaluate)

        batches = jax.tree.map(lambda leaf: leaf[start:], self.stacked)
        return jax.vmap(one)(jnp.arange(start, self.count), batches)

    def values(self, params: chex.ArrayTree, start: int = 0, mode: str = "auto") -> tuple[chex.Array, Any]:
        """`(losses, aux)` of the objectives from `start` on; aux is None without `has_aux`."""
        if self.prefers_vmap(mode) and self.count - start > 1:
            result = self.vmap(lambda evaluate: evaluate(params), start)
        else:
            result = stack([self.evaluate(k, params) for k in range(start, self.count)])
        return result if self.has_aux else (result, None)


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
    if len({(a.ndim, a.shape[1:]) for a in arrays}) > 1:
        return False
    # A shared objective axis is equally long in all arrays; scalars have none.
    lengths = {a.shape[0] for a in arrays if a.ndim}
    if len(lengths) != 1:
        return True
    (length,) = lengths
    # Tokens and their mask, say. Floats may differ in precision.
    if len({a.dtype for a in arrays}) > 1 and not all(map(_is_floating, arrays)):
        return expected == len(batches) and expected != length
    if length < 2 or (expected is not None and length != expected):
        return True
    if expected is not None and len(batches) != expected:
        return False
    raise ValueError(
        f"batches: {len(batches)} arrays of shape {arrays[0].shape} may be one stacked batch of {length} objectives or "
        f"{len(batches)} batches; stack the batches with stack_objectives, or make the stacked batch a dict"
    )


def _is_floating(array):
    return jnp.issubdtype(array.dtype, jnp.floating)


def _checked(result, has_aux):
    """What a loss returned, if it is a scalar, or with `has_aux` a pair of a scalar and anything."""
    if has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
        raise ValueError(f"loss: returned {_describe_result(result)}, expected (loss, aux) because has_aux=True")
    value = result[0] if has_aux else result
    if not (jnp.isscalar(value) or hasattr(value, "shape")) or jnp.shape(value) != ():
        hint = "pass has_aux=True for (loss, aux)" if isinstance(value, tuple) else "take the mean over the examples"
        raise ValueError(f"loss: returned {_describe_result(value)}, expected a scalar; {hint}")
    return result


def _describe_result(result):
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    if not hasattr(result, "shape"):
        return f"a {type(result).__name__}"
    return f"shape {result.shape}" if result.shape else "a scalar"


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
            f"batches: got leaves of shapes {shapes or 'none'}, expected the same leading objective axis K in all of "
            "them (see stack_objectives), or a tuple of K batches; bare arrays count as batches only if they differ in "
            "nothing but the number of examples, so make each batch a dict if they differ otherwise"
        )
    (count,) = lengths
    if count < 2:
        raise ValueError(f"batches: got K = {count}, expected K >= 2: a forget batch and at least one retain batch")
    return count


def _same_shapes(batches):
    described = [[(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)] for batch in batches]
    return all(other == described[0] for other in described)


def stack(trees: Sequence[chex.ArrayTree]) -> chex.ArrayTree:
    """Stacks trees of one structure and equal shapes, leaf by leaf, along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
