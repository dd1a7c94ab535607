"""What a run reports: losses of both sets over time, figures before and after, and a progress bar."""

import contextlib
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eupmu_jax._stack.algebra import gram_matrix
from eupmu_jax._stack.programs import jit_for_task
from eupmu_jax._stack.states import nodes
from eupmu_jax.controllers import SteeringState
from eupmu_jax.gradients.batches import stack
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.methods.method import Settings
from eupmu_jax.tasks import Task
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training._streams import sample_positions

NAMES = ("step", "forget_loss", "retain_loss", "cosine", "multiplier", "forget_error", "retain_error", "weight")


class Watch:
    """Measures a run on samples of its sets, in chunks as large as both batches of a step together."""

    def __init__(self, task: Task, settings: Settings, sets: Sets, held_out, seed, steps, probes, chunk):
        self.task, self.sets, self.chunk = task, sets, chunk
        self.wanted = probes > 0
        self.history: dict[str, list[float]] = {name: [] for name in NAMES} if probes else {}
        self.figures: dict[str, dict[str, float]] = {}
        self.steps = set(np.linspace(0, steps, probes + 1).round().astype(int).tolist()) if probes else set()
        self.positions = sample_positions(sets.counts, np.random.default_rng(seed))
        # For methods without a choice of forget objective: relabelling, or else the task's first.
        named = settings.get("forget_objective", "random_labels")
        self.objective = named if named in task.forget else next(iter(task.forget))
        self.samples = {"forget": (sets.forget, self.positions[0]), "retain": (sets.retain, self.positions[1])}
        if held_out is not None:
            self.samples["held_out"] = held_out, sample_positions((len(held_out),), np.random.default_rng(seed))[0]

    def record(self, count: int, carry, draw_key: chex.PRNGKey) -> None:
        """Adds a point to the history."""
        if not self.wanted:
            return
        gradients = []
        for k, loss in enumerate((self.task.forget[self.objective], self.task.retain)):
            # On no more examples than a step takes: on all, ten probes would cost more than half of 300 steps.
            batch = self.sets.batch(k, self.positions[k][: self.chunk], self.task, draw_key)
            gradients.append(_gradient(self.task, loss, carry.params, batch))
        figures = self._figures(carry.params)
        point = {
            "step": count,
            "forget_loss": figures["forget_loss"],
            "retain_loss": figures["retain_loss"],
            "cosine": _cosine(gradients),
            "multiplier": _multiplier(carry.state),
            "forget_error": figures.get("forget_error", np.nan),
            "retain_error": figures.get("retain_error", np.nan),
            "weight": _weight(carry.state),
        }
        for name, value in point.items():
            self.history[name].append(float(value) if name != "step" else value)

    def add_figures(self, name: str, params: chex.ArrayTree) -> None:
        """Measures parameters for the table at the end."""
        if self.wanted:
            self.figures[name] = self._figures(params)

    def _figures(self, params):
        figures: dict[str, float] = {}
        for name, (examples, positions) in self.samples.items():
            values = _mean(self.task, params, examples, positions, self.chunk)
            figures |= {f"{name}_{part}": float(value) for part, value in values.items()}
        return figures


def retain_figures(task: Task, params: chex.ArrayTree, examples, chunk: int) -> dict[str, float]:
    """`retain_loss` and `retain_error` over a whole set, in chunks; the error is the loss where a task has none."""
    found = _mean(task, params, examples, np.arange(len(examples)), chunk)
    return {"retain_loss": float(found["loss"]), "retain_error": float(found.get("error", found["loss"]))}


def _mean(task, params, examples, positions, chunk):
    """The mean loss and error of some examples, in chunks of at most this size, each weighted by its own."""
    total = None
    # Of nearly the same size, as every other size is another program to compile.
    for part in np.array_split(positions, -(-len(positions) // chunk)):
        total = _added(total, len(part) / len(positions), _loss_and_error(task, params, examples[part]))
    return total


@jax.jit
def _added(total, share, tree):
    tree = jax.tree.map(lambda leaf: share * leaf, tree)
    return tree if total is None else jax.tree.map(jnp.add, total, tree)


@jit_for_task()
def _loss_and_error(task, params, batch):
    outputs = task.outputs(params, batch, None)
    figures = {"loss": task.retain(outputs, batch)}
    return figures if task.error is None else figures | {"error": jnp.mean(task.error(outputs, batch))}


@jit_for_task(choices=1)
def _gradient(task, loss, params, batch):
    return jax.grad(lambda p: loss(task.outputs(p, batch, None), batch))(params)


@jax.jit
def _cosine(gradients):
    """Cosine between the forget and the retain gradient; 0 if either is zero."""
    gram = gram_matrix(stack(gradients))
    norms = jnp.sqrt(gram[0, 0] * gram[1, 1])
    return jnp.where(norms > 0, gram[0, 1] / jnp.where(norms > 0, norms, 1), 0.0)


def _multiplier(state):
    values = optax.tree_utils.tree_get(state, "multipliers")
    return np.nan if values is None else values[0]


def _weight(state):
    found = nodes(state, lambda node: isinstance(node, SteeringState))
    return found[0].weights[0] if found else np.nan


@contextlib.contextmanager
def progress_bar(description: str, steps: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of steps made."""
    if not wanted:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        bar = progress.add_task(description, total=steps)
        yield lambda count: progress.update(bar, completed=count)


def show(figures: dict[str, dict[str, float]], share: float | None, level=None, rates: bool = True) -> None:
    """Prints what the run did to each set, and how much of it the measured limit allowed."""
    if not figures:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = list(figures["original"])
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in figures.items():
        table.add_row(name, *(f"{row[column]:{'.4f' if rates else '.4g'}}" for column in columns))
    console = Console()
    console.print(table)
    if share is not None:
        console.print(f"The run ends at {100 * share:.0f} % of the way to the last parameters.")
    if level is not None:
        number = lambda value: f"{value:.3f}" if rates else f"{value:.4g}"
        aimed = f"target {number(level.target)} ({level.source})"
        console.print(
            f"Forget error {number(level.forget_error)}, "
            f"{aimed if level.target < UNLIMITED else 'no known target'}; retain error "
            f"{number(level.retain_error)}, limit {number(level.limit)}, {'kept' if level.kept else 'exceeded'}."
        )
