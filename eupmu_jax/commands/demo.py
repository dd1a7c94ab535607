"""`eupmu demo`: an original model, one retrained without the forget set, and what seven methods make of it."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import problems
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.commands import document, page
from eupmu_jax.commands._command_line import command_line
from eupmu_jax.methods import METHODS as ALL_METHODS
from eupmu_jax.training import checkpoints
from eupmu_jax.training._alone import alone
from eupmu_jax.training._faults import check_readable, make_folder
from eupmu_jax.training.unlearning import unlearn

# How many times a run is measured.
PROBES = 20
# Training examples held out from every model; EUPMU measures the level of unseen data on them.
HELD_OUT = {"digits": 250, "fashion_mnist": 2_000}
METHODS = (
    "fine-tuning",
    "gradient ascent",
    "random labels",
    "EUPMU",
    "EUPMU explicit",
    "EUPMU implicit",
    "EUPMU next-batch",
)


class Size(NamedTuple):
    """Size of a run: passes over the forget set, and examples per step."""

    epochs: int
    forget_batch: int
    retain_batch: int

    def steps(self, num_forget: int) -> int:
        """Optimizer steps for whole passes over a forget set of `num_forget` examples."""
        return self.epochs * -(-num_forget // min(self.forget_batch, num_forget))


def settings_for(name: str, split: data.Split) -> tuple[Size, dict[str, dict]]:
    """The run's size and every method's settings, as tuned with equal trials by `experiments/demo/tune.py`.

    EUPMU has none, as it runs untuned.
    """
    tuned = json.loads(files("eupmu_jax.commands").joinpath("demo_settings.json").read_text())
    chosen = tuned[name]["random" if split.forget_class is None else "class"]
    return Size(**chosen["plan"]), {method: found["settings"] for method, found in chosen["methods"].items()}


def run(name: str, forget: str, seed: int, out: Path, console: Console) -> list[dict]:
    """Trains, unlearns, evaluates, prints a table, and writes rows, checkpoints and a page to `out`.

    Args:
      name: "digits" or "fashion_mnist".
      forget: "class:N" or "random:P%".
      seed: Seed of the split, the models and the methods.
      out: Folder for `rows.jsonl`, `report.html`, `checkpoints/` and the cache `models/` of trained models.
      console: Where progress and the table are printed.

    Returns:
      The rows: original, retrained, then one for each method.

    Raises:
      ValueError: Before any work, for an unknown data set, an impossible forget set or an unwritable folder.
      FileNotFoundError: If the data set is not on this machine.
    """
    _check(name, forget, seed, out)
    with alone(out):
        return _run(name, forget, seed, out, console)


def _run(name, forget, seed, out, console):
    prepared = problems.make(name, forget, seed, held_out=HELD_OUT[name])
    # Rows that the same command finished before it was interrupted.
    before = [row for row in saved_rows.read(out / "rows.jsonl") if row["method"] in METHODS]
    size, settings = settings_for(name, prepared.split)
    steps = size.steps(len(prepared.forget))
    everything, retained = np.arange(len(prepared.dataset.train_labels)), prepared.split.retain_ids
    with progress_of(console) as progress:

        def train(description, ids, init_seed):
            with bar(progress, description, problems.training_steps(prepared, ids)) as advance:
                model = problems.train(prepared, ids, init_seed=init_seed, cache=out / "models", on_step=advance)
            return model, problems.evaluate(prepared, model.params, attacks=())

        original, original_figures = train("original model", everything, seed)
        retrained, retrained_figures = train("retrained model", retained, seed + problems.RETRAINED_SEED_OFFSET)

        def row(method, figures, seconds, forward, backward, **more):
            return {
                "method": method,
                "data": name,
                "forget": forget,
                "seed": seed,
                "examples": {"forget": len(prepared.forget), "test": len(prepared.dataset.test_labels)},
                **figures,
                "gap": metrics.average_gap(figures, retrained_figures),
                "rise": figures["retain_loss"] - original_figures["retain_loss"],
                "seconds": seconds,
                "share_of_retraining": 100 * seconds / retrained.seconds,
                "forward_passes": forward / len(everything),
                "backward_passes": backward / len(everything),
                **more,
                "split": data.digest(prepared.split),
                **saved_rows.provenance(command_line()),
            }

        rows = [
            row(label, figures, model.seconds, model.examples, model.examples)
            for label, figures, model in (
                ("original", original_figures, original),
                ("retrained", retrained_figures, retrained),
            )
        ]
        saved_rows.replace(out / "rows.jsonl", [*rows, *before])
        for method in METHODS:
            tuned = settings.get(method)
            identity = {
                "method": method,
                "method_version": ALL_METHODS[method].version,
                "settings": tuned,
                "plan": size._asdict() | {"steps": steps},
                **{key: rows[0][key] for key in ("data", "forget", "seed", "split", "versions", "device")},
            }
            if finished := saved_rows.select(before, **identity):
                rows.append(finished[0])
                continue
            with bar(progress, method, steps) as advance:
                result = unlearn(
                    method,
                    prepared.task,
                    original.params,
                    prepared.forget,
                    prepared.retain,
                    prepared.held_out,
                    steps=steps,
                    settings=None if tuned is None else {"optimizer": "sgd"} | tuned,
                    seed=seed,
                    forget_batch=size.forget_batch,
                    retain_batch=size.retain_batch,
                    start=problems.start_of(original_figures),
                    probes=PROBES,
                    warm=True,
                    on_step=advance,
                )
            figures = problems.evaluate(prepared, result.params, attacks=())
            more = {
                "allowed_rise": (tuned or {}).get("allowed_rise") if ALL_METHODS[method].family == "EUPMU" else None,
                "level": page.of_level(result.level),
                "compile_seconds": result.compile_seconds,
                "history": result.history,
                "returned": None if result.share is None else result.figures["returned"],
            }
            more |= {key: identity[key] for key in ("method_version", "settings", "plan")}
            rows.append(row(method, figures, result.seconds, result.forward, result.backward, **more))
            folder = out / "checkpoints" / method.replace(" ", "-")
            checkpoints.save(
                folder, result.params, {key: rows[-1][key] for key in ("method", "data", "forget", "seed")}
            )
            # Written last, because a method that has its row is not run again.
            saved_rows.append(out / "rows.jsonl", rows[-1])

    rows = saved(rows, out, page.render)
    show(f"{name}: forget {forget}, seed {seed}", rows, page.best_of(rows), page, out, console)
    return rows


def saved(rows: list[dict], out: Path, render: Callable[[list[dict]], str]) -> list[dict]:
    """Writes the rows and their page; returns the rows as written."""
    rows = saved_rows.finite(rows)
    saved_rows.replace(out / "rows.jsonl", rows)
    document.write(out / "report.html", render(rows))
    return rows


def show(title: str, rows: list[dict], best: list[dict], view: ModuleType, out: Path, console: Console) -> None:
    """Prints a table with a row for each model, the best ones green, then the legend and headline of `view`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in view.COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        style = "dim" if row in rows[:2] else "bold green" if row in best else None
        table.add_row(row["method"], *view.cells(row), style=style, end_section=row is rows[1])
    console.print(table)
    key = Table.grid(padding=(0, 2, 0, 0))
    for term, meaning in view.LEGEND:
        key.add_row(term, meaning)
    console.print(key, style="dim")
    console.print(f"\n{view.headline(rows)}", highlight=False)
    console.print(f"\nrows, checkpoints and report.html: {out}", highlight=False, soft_wrap=True)


def _check(name, forget, seed, out):
    """Raises `ValueError` for invalid arguments, named as on the command line, before any work."""
    if name not in HELD_OUT:
        raise ValueError(f"data: got {name!r}, expected {', '.join(HELD_OUT)}, digits-diffusion or persons")
    if not re.fullmatch(r"class:\d+|random:\d+(\.\d+)?%", forget):
        raise ValueError(f"forget: got {forget!r}, expected a class such as class:3, or a share such as random:10%")
    check_folder(seed, out)
    check_rows(out, lambda row: "kind" not in row and "gap" in row)


def progress_of(console: Console) -> Progress:
    """Progress bars that count their steps and disappear at the end."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


@contextlib.contextmanager
def bar(progress: Progress, name: str, steps: int) -> Iterator[Callable[[], None]]:
    """A context with a bar of `steps` steps; yields a function that advances it, and fills the bar at the end."""
    task = progress.add_task(name, total=steps)
    yield functools.partial(progress.advance, task)
    progress.update(task, completed=steps)


def check_rows(out: Path, is_own: Callable[[dict], bool]) -> None:
    """Raises `ValueError` for a folder that has rows of something other than this demo."""
    if not all(map(is_own, saved_rows.read(out / "rows.jsonl"))):
        raise ValueError(f"out: got {out}, whose rows.jsonl has rows of something else; expected a folder of its own")


def check_folder(seed: int, out: Path) -> None:
    """Raises `ValueError` for an invalid seed or an unwritable folder."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed: got {seed}, expected a number from 0 to {2**31 - 1}")
    check_readable("out", out)
    make_folder("out", out)
    try:
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {out} ({error.strerror}); expected a writable folder") from None
