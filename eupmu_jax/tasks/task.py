"""All that a method may know of a model and its losses: pure functions over batches, which are any pytrees."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax

from eupmu_jax._stack.checks import check_int


class Task(NamedTuple):
    r"""A model and its losses as pure functions, independent of any data set, file or kind of model.

    Batches are pytrees of arrays with the examples along the first axis, and so are outputs. Every method of
    `eupmu_jax.methods` runs on any task that has the functions it needs; those that default to None are optional.

    Attributes:
      outputs: `outputs(params, batch, key) -> outputs`: one forward pass. `key` drives dropout, noise or augmentation
        and is the same for all losses of a step; None asks for the deterministic outputs of evaluation.
      retain: `retain(outputs, batch) -> scalar`: the utility loss, a mean over examples, minimised. For a whole set it
        is the mean over the batches weighted by their numbers of examples, even if tokens give some examples more
        weight.
      forget: Forget losses by name, each `(outputs, batch) -> scalar`, minimised; the first is the default.
      divergence: `divergence(outputs, other_outputs) -> scalar`, of the model from a fixed teacher; 0 for equal
        outputs. If it requires a third argument, that is the batch, which tells what is padding. A method that softens
        it by a temperature T uses T^2 times the divergence of outputs divided by T.
      draw: `draw(key, epoch, batch) -> batch`: draws what is new in every pass over the forget set (random labels),
        where a pass counts as ceil(examples / batch size) steps. It may change and add leaves, and keeps the order of
        the examples.
      error: `error(outputs, batch) -> (n,)`: an easily understood figure for each example, such as 1 for wrong.
      fresh_params: `fresh_params(key) -> params`: untrained parameters with the structure of the trained ones.
      num_classes: Number of classes of a classifier, for methods that use its decision boundaries; their batches are
        dicts with `inputs` and `labels`. None for all other tasks.
      unknown: `unknown(params, batch) -> (errors, passes)`: the error that a model without knowledge of its condition
        makes on each example, and the forward passes of each that this took: the target level for a condition to be
        forgotten entirely.
      check: `check(batch)`: raises `ValueError` for examples that the model cannot take, such as a label it does not
        have. `unlearn` calls it before any work, on concrete batches.
      check_model: `check_model(params, batch)`: the same for what only the parameters reveal, such as tokens beyond the
        vocabulary, and for parameters that do not match the model that the task compares with.
      rate: Whether the mean error is a rate, such as the share of wrong tokens; that of a classifier always is. 0.01 of
        a rate is a percentage point. Other errors may be in any unit; EUPMU measures them relative to their distance
        from the target.
      nll: `nll(outputs, batch) -> scalar`: the mean negative log-likelihood, if `retain` is another loss, such as a
        distance to the original model. Attacks measure with it what a model knows; None if `retain` does that.
      score: `score(outputs, batch) -> (n,)`: how sure the model is of each example, the higher the surer, on a scale
        without ends on which its gradient does not vanish, such as log-odds (`objectives.log_odds`). Where no
        probability is at hand, minus the loss of each example will do.

    >>> import jax.numpy as jnp
    >>> def squares(outputs, batch):
    ...     return jnp.mean((outputs - batch["y"]) ** 2)
    >>> task = Task(
    ...     outputs=lambda params, batch, key: batch["x"] @ params,
    ...     retain=squares,
    ...     forget={"ascent": lambda outputs, batch: -squares(outputs, batch)},
    ... )
    >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.zeros(2)}
    >>> float(task.retain(task.outputs(jnp.ones(3), batch, None), batch))
    9.0
    """

    outputs: Callable[[Any, Any, Any], Any]
    retain: Callable[[Any, Any], Any]
    forget: Mapping[str, Callable[[Any, Any], Any]]
    divergence: Callable[..., Any] | None = None
    draw: Callable[[Any, Any, Any], Any] | None = None
    error: Callable[[Any, Any], Any] | None = None
    fresh_params: Callable[[chex.PRNGKey], Any] | None = None
    num_classes: int | None = None
    unknown: Callable[[Any, Any], tuple[Any, int]] | None = None
    check: Callable[[Any], None] | None = None
    rate: bool = False
    nll: Callable[[Any, Any], Any] | None = None
    check_model: Callable[[Any, Any], None] | None = None
    score: Callable[[Any, Any], Any] | None = None

    def __hash__(self) -> int:
        """Equal functions make equal tasks, so that runs on one task share compiled code."""
        return hash(tuple(tuple(part.items()) if isinstance(part, Mapping) else part for part in self))

    @property
    def is_rate(self) -> bool:
        """Whether its errors are rates, declared as such or of a classifier."""
        return self.rate or self.num_classes is not None

    @property
    def attacked(self) -> "Task":
        """The task for an attack: its retain loss is `nll` if there is one."""
        return self if self.nll is None else self._replace(retain=self.nll, nll=None)


def of_each(loss: Callable, outputs: chex.ArrayTree, batch: chex.ArrayTree) -> chex.Array:
    """The values `(n,)` of a loss, a mean over examples, on each example alone."""
    single = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    return jax.vmap(lambda output, example: loss(single(output), single(example)))(outputs, batch)


def drawn(batch: Mapping[str, Any]) -> chex.Array:
    """The labels that `Task.draw` has added to a batch; raises `ValueError` if it has not been called.

    >>> drawn({"inputs": 0})
    Traceback (most recent call last):
    ValueError: batch: got inputs, but random_labels needs labels that are drawn; expected task.draw(key, epoch, batch)
    """
    if "random_labels" not in batch:
        raise ValueError(
            f"batch: got {', '.join(batch)}, but random_labels needs labels that are drawn; expected task.draw(key, "
            "epoch, batch)"
        )
    return batch["random_labels"]


def check_function(name: str, function: Any, wanted: str, arguments: int | None = None) -> None:
    """Raises `ValueError` unless `function` is callable, takes so many arguments, and is hashable.

    Equal tasks share compiled code, for which their functions must be hashable. A module of Flax is callable, but is no
    function of parameters.

    >>> check_function("apply", lambda inputs: inputs, "a function (params, inputs) -> logits", 2)
    Traceback (most recent call last):
    ValueError: apply: got a function of (inputs), expected a function (params, inputs) -> logits
    """
    if not callable(function) or _is_module(function):
        found = f"{type(function).__name__}, whose function is .apply" if hasattr(function, "apply") else repr(function)
        if _is_module(function) and not hasattr(function, "apply"):
            found = f"the module {type(function).__name__}, which nnx.split and nnx.merge turn into a function"
        raise ValueError(f"{name}: got {found}, expected {wanted}")
    if arguments is not None and (taken := _signature(function)) is not None:
        try:
            taken.bind(*[None] * arguments)
        except TypeError:
            raise ValueError(f"{name}: got a function of {taken}, expected {wanted}") from None
    try:
        hash(function)
    except TypeError:
        kind = type(function).__name__
        raise ValueError(
            f"{name}: got {kind}, which is not hashable, expected {wanted}, such as a lambda that calls it"
        ) from None


def _is_module(function):
    """Whether this is a module of Flax, which this layer does not import."""
    return any(base.__name__ == "Module" and base.__module__.startswith("flax.") for base in type(function).__mro__)


def _signature(function):
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # Functions written in C may have none.
        return None


def check_task(task: Task) -> None:
    """Raises `ValueError` unless `task` is a `Task` with the functions that every method needs.

    >>> check_task(Task(outputs=None, retain=None, forget={}))
    Traceback (most recent call last):
    ValueError: task.outputs: got None, expected a function (params, batch, key) -> outputs
    """
    if not isinstance(task, Task):
        raise ValueError(
            f"task: got {type(task).__name__}, expected a Task, such as eupmu_jax.tasks.classification(apply, "
            "num_classes=10)"
        )
    check_function("task.outputs", task.outputs, "a function (params, batch, key) -> outputs", 3)
    check_function("task.retain", task.retain, "a function (outputs, batch) -> scalar", 2)
    if not isinstance(task.forget, Mapping) or not task.forget:
        raise ValueError(f"task.forget: got {task.forget!r}, expected a dict of at least one forget loss by name")
    for name, loss in task.forget.items():
        check_function(f"task.forget[{name!r}]", loss, "a function (outputs, batch) -> scalar", 2)
    for name in ("divergence", "draw", "error", "fresh_params", "unknown", "check", "nll", "check_model", "score"):
        if getattr(task, name) is not None:
            check_function(f"task.{name}", getattr(task, name), "a function or None")
    if task.num_classes is not None:
        check_int("task.num_classes", task.num_classes, 2, static=True)
    if not isinstance(task.rate, bool) or (task.rate and task.error is None):
        raise ValueError(f"task.rate: got {task.rate!r}, expected True or False, and True only with an error")
