"""Checks of what a caller passes: numbers, the number of objectives, stacked trees and losses.

Values are checked only where they are known: a traced one (inside `jit`, or from `optax.inject_hyperparams`) passes.
Shapes and dtypes are always known.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_traced(*values: Any) -> bool:
    """Whether the value of any of these is not yet known."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def check_numbers(
    name: str,
    value: Any,
    least: float | None = None,
    *,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    finite: bool = False,
    why: str = "",
) -> int | None:
    """Raises `ValueError` unless `value` is a number, or an array of one for each constraint, within bounds, not NaN.

    Args:
      name: Name of the argument, with which the message begins.
      value: A number or a `(K-1,)` array.
      least, most, above, below: The bounds, the first two included.
      finite: Whether infinity is refused.
      why: Ends the message.

    Returns:
      The length of the array, or None for a number.

    >>> check_numbers("gain", 0.5, 0), check_numbers("gain", np.ones(3), 0)
    (None, 3)
    """
    bounds = {">=": least, ">": above or None, "<=": most, "<": below}
    given = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)
    expected = f"a {'finite ' * finite}{'positive ' * (above == 0)}number {given}".rstrip() + why
    if np.ndim(value) > 1:
        raise ValueError(f"{name}: got shape {np.shape(value)}, expected a number or one for each constraint")
    if not is_traced(value):
        try:
            numbers = np.asarray(value).astype(np.float64, casting="same_kind")
        except (TypeError, ValueError):
            raise ValueError(f"{name}: got {value!r}, expected {expected}") from None
        holds = ~np.isnan(numbers)
        holds &= (numbers >= (-np.inf if least is None else least)) & (not finite or np.isfinite(numbers))
        holds &= (True if above is None else numbers > above) & (True if below is None else numbers < below)
        holds &= True if most is None else numbers <= most
        if not np.all(holds):
            raise ValueError(f"{name}: got {value}, expected {expected}")
    return np.size(value) if np.ndim(value) else None


def check_number(name: str, value: Any, least: float | None = None, **bounds: Any) -> None:
    """As `check_numbers`, for a value that must be one number."""
    if check_numbers(name, value, least, **bounds) is not None:
        raise ValueError(f"{name}: got shape {np.shape(value)}, expected one number")


def check_int(name: str, value: Any, least: int, unit: str = "", *, static: bool = False) -> None:
    """Raises `ValueError` unless `value` is an int of at least `least`; `static` refuses arrays and floats like 2.0."""
    kinds = (int, np.integer) if static else (int, float, np.number, np.ndarray, jax.Array)
    is_number = isinstance(value, kinds) and np.ndim(value) == 0
    if (static or not is_traced(value)) and not (
        is_number and value >= least and np.isfinite(value) and value == np.floor(value)
    ):
        found = repr(value) if isinstance(value, jax.Array) else value
        raise ValueError(f"{name}: got {found}, expected an int of at least {least}{unit}")


def as_transform(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """An optax transform that ignores extra args it does not know; raises `ValueError` for anything else.

    >>> as_transform("optimizer", optax.adam)
    Traceback (most recent call last):
    ValueError: optimizer: got <function adam at ...>, expected an optax transform such as optax.sgd(0.1)
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise ValueError(f"{name}: got {value}, expected an optax transform such as optax.sgd(0.1)")
    return optax.with_extra_args_support(value)


def check_retain_losses(values: Any, num_objectives: int, dtype: Any) -> chex.Array:
    """`(K-1,)` retain losses as a `value_fn` returned them; raises `ValueError` for another shape."""
    k, values = num_objectives, jnp.asarray(values, dtype)
    if values.shape not in ((k - 1,), () if k == 2 else None):
        raise ValueError(
            f"value_fn: returned shape {values.shape}, expected ({k - 1},): the retain losses, without the forget loss"
        )
    return values.reshape(k - 1)


def resolve_num_objectives(num_objectives: int | None, *num_constraints: int | None) -> int | None:
    """K, from the argument or from the lengths of per-constraint values; raises `ValueError` if they disagree."""
    if isinstance(num_objectives, jax.Array):
        raise ValueError(
            "num_objectives: got an array, expected an int; optax.inject_hyperparams turns ints into arrays unless "
            "given static_args='num_objectives'"
        )
    if num_objectives is not None and not isinstance(num_objectives, int | np.integer):
        raise ValueError(f"num_objectives: got {num_objectives!r}, expected an int")
    if num_objectives is not None and num_objectives < 2:
        raise ValueError(f"num_objectives: got {num_objectives}, expected K >= 2: one forget and K-1 retain objectives")
    for length in num_constraints:
        if length is not None and num_objectives is not None and length != num_objectives - 1:
            raise ValueError(
                f"tolerance, retain_weight or initial_multiplier: got {length} values, expected {num_objectives - 1}: "
                "one for each retain constraint"
            )
        if length == 0:
            raise ValueError("tolerance, retain_weight or initial_multiplier: got no values, expected one or more")
        if length is not None:
            num_objectives = length + 1
    return num_objectives


def check_count(
    num_objectives: int, expected: int | None, argument: str = "updates", *, at_most: int | None = None
) -> None:
    """Raises `ValueError` for a number of objectives other than the one set at the start, or above `at_most`."""
    if expected is not None and num_objectives != expected:
        raise ValueError(
            f"{argument}: got {num_objectives} objectives, expected {expected}, as set by num_objectives or by the "
            f"length of a tolerance or of weights; pass num_objectives={num_objectives} if {num_objectives} are meant"
        )
    if at_most is not None and num_objectives > at_most:
        raise ValueError(
            f"{argument}: got {num_objectives} objectives, expected at most {at_most}: {at_most - 1} retain "
            "constraints; average some of the retain losses"
        )


def count_objectives(updates: chex.ArrayTree, params: chex.ArrayTree | None = None, expected: int | None = None) -> int:
    """Returns K, the length of the objective axis shared by all leaves of `updates`.

    Args:
      updates: Stacked tree, every leaf of shape `(K, *param.shape)`.
      params: The parameters, if known; then structure and shapes are checked against them.
      expected: K if it was set at the start.

    Returns:
      K, at least 2.

    Raises:
      ValueError: If a leaf has no objective axis, leaves disagree on K, K is 1 or not the one expected, shapes or
        structures differ from those of `params`, part of the tree is masked out, or a leaf is complex.
    """
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
        raise ValueError(
            "updates: some leaves are masked, so this transform is inside optax.masked or optax.partition, where "
            "the other leaves would keep their objective axis and corrupt the parameters they are added to; wrap the "
            "whole chain in eupmu_jax.freeze(chain, frozen) instead"
        )
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if not leaves:
        raise ValueError("updates: got a tree without leaves; expected the stacked gradients of K >= 2 objectives")
    check_real("updates", updates)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (updates, params)]
    if params is not None and structures[0] != structures[1]:
        raise ValueError(
            f"updates: structure {structures[0]} differs from that of params, {structures[1]}; expected the same tree "
            "with an objective axis in front of every leaf"
        )
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    param_shapes = [jnp.shape(p) for p in jax.tree.leaves(params)] if params is not None else [s[1:] for s in shapes]
    if params is not None and shapes == param_shapes:
        raise ValueError(
            f"updates: every leaf has its parameter's shape, such as {shapes[0]}, expected {_behind('K', shapes[0])}: "
            "this transform takes stacked gradients. explicit_step and stacked_value_and_grad compute them; "
            "implicit_step computes a single gradient, for a chain that ends with implicit_surgery; optax.MultiSteps "
            "cannot hold a stack, eupmu_jax.accumulate can"
        )
    first = shapes[0][0] if shapes[0] else 0
    for (path, _), shape, param_shape in zip(leaves, shapes, param_shapes, strict=True):
        if not shape or shape != (first, *param_shape):
            expected_shape = _behind(first or "K", param_shape if params is not None else ("...",))
            raise ValueError(
                f"updates: leaf {describe(path)} has shape {shape}, expected {expected_shape}: every leaf needs the "
                "same leading objective axis; stacked_value_and_grad makes such trees"
            )
    if first < 2:
        raise ValueError(
            f"updates: got K = {first} objective; surgery needs K >= 2, the forget gradient in row 0 and at least one "
            "retain gradient after it"
        )
    check_count(first, expected)
    return first


def _behind(count, shape):
    """A shape after the objective axis, in words."""
    return f"({', '.join(map(str, (count, *shape)))}{',' * (not shape)})"


def check_losses(losses: chex.ArrayTree | None, num_objectives: int, *, needed: bool = False) -> Any:
    """Returns `losses` as a `(K,)` array, or None if none were given; raises `ValueError` on any other shape.

    With `needed`, None is refused too.
    """
    if losses is None:
        if needed:
            raise ValueError(
                f"losses: got None, expected the ({num_objectives},) losses of this step: update(..., losses=losses)"
            )
        return None
    losses = jnp.asarray(losses)
    if losses.shape != (num_objectives,):
        raise ValueError(
            f"losses: got shape {losses.shape}, expected ({num_objectives},): one loss for each objective, the forget "
            "loss first"
        )
    return losses


def check_errors(errors: chex.ArrayTree | None, num_objectives: int | None = None) -> Any:
    """Returns `errors` as a `(K,)` array, K at least 2; raises `ValueError` for None or any other shape."""
    wanted = f"({num_objectives or 'K'},): one error for the batch of each objective, the forget batch first"
    if errors is None:
        raise ValueError(
            f"errors: got None, expected {wanted}; call update(..., errors=errors), or explicit_step(..., errors=...)"
        )
    errors = jnp.asarray(errors)
    if errors.ndim != 1 or errors.size < 2 or errors.size != (num_objectives or errors.size):
        raise ValueError(f"errors: got shape {errors.shape}, expected {wanted}")
    return errors


def check_same_structure(name: str, tree: chex.ArrayTree, like_name: str, like: chex.ArrayTree, why: str = "") -> None:
    """Raises `ValueError` if `tree` differs from `like` in structure."""
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(like)]
    if structures[0] == structures[1]:
        return
    given, wanted = ([describe(path) for path, _ in jax.tree_util.tree_leaves_with_path(part)] for part in (tree, like))
    found = f"structure {structures[0]}, expected that of {like_name}, {structures[1]}"
    lacking, more = ([path for path in one if path not in other] for one, other in ((wanted, given), (given, wanted)))
    if describe(()) not in (*given, *wanted) and lacking + more:
        found = f"no leaf {lacking[0]}" if lacking else f"a leaf {more[0]}, which {like_name} lacks"
        found += f", expected the structure of {like_name}"
    raise ValueError(f"{name}: got {found}{why}")


def check_same_shapes(name: str, tree: chex.ArrayTree, like_name: str, like: chex.ArrayTree, why: str = "") -> None:
    """Raises `ValueError` if `tree` differs from `like` in structure or in the shape of a leaf."""
    check_same_structure(name, tree, like_name, like, why)
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True)
    for (path, leaf), other in pairs:
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name}: leaf {describe(path)} has shape {jnp.shape(leaf)}, but {jnp.shape(other)} in {like_name}{why}"
            )


def check_real(name: str, tree: chex.ArrayTree) -> None:
    """Raises `ValueError` for a complex leaf: inner products and gradients here are those of real vectors."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.complexfloating):
            raise ValueError(
                f"{name}: leaf {describe(path)} is complex, expected real numbers; keep the real and imaginary parts "
                "as two leaves and combine them in the loss"
            )


def describe(path: Any) -> str:
    """A leaf's place in its tree, in words."""
    return jax.tree_util.keystr(path) or "the tree itself"
