"""`eupmu unlearn`: unlearns some of a user's data in their own model, from ids to parameters."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.service import _words, deletion, folder, ledger, read_ids, records, retraining, user_file
from eupmu_jax.service import plan as plans
from eupmu_jax.tasks import as_examples
from eupmu_jax.training.mesh.topology import Chip, fitting


def run(
    file: Path,
    forget: "Path | tuple[Path, int]",
    out: Path,
    after: Path | None,
    asked: deletion.Asked,
    command: str,
    console: Console,
    retrain: bool = False,
) -> bool:
    """Runs `deletion.run` with a progress bar and prints the result.

    Returns whether the request was met and nothing that earlier runs forgot is known again.

    Args:
      file: The user's Python file.
      forget: A file of ids, or a ledger and the number of a request in it, whose state is then updated.
      out, after, asked, command: See `deletion.run`.
      console: Where the progress and the result are printed.
      retrain: Whether to call the file's `retrain` too.
    """
    own = user_file.load(file, (*deletion.NEEDED, "retrain") if retrain else deletion.NEEDED)
    if retrain:
        retraining.check(own)
    ids = _ids(own["data"], forget)
    request, is_new = None if isinstance(forget, Path) else forget, not (out / "reached.json").exists()
    if request:
        with ledger.opened(request[0]) as connection:
            if is_new:
                _check_order(connection, request[1], after)
            _warn_of_other_data(connection, request[1], console)
    with Progress(console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: console.print(
            f"Warning: {message}", highlight=False, markup=False, soft_wrap=True
        )
        bar = progress.add_task("unlearning", total=asked.steps)
        reached = deletion.run(own, ids, out, asked, command, after, lambda: progress.advance(bar))
    met = reached["met"] and not reached.get("returned")
    try:
        console.print(said(reached, out), highlight=False, markup=False, soft_wrap=True)
    finally:
        # Whoever reads the output may be gone, which ends the command; the request is answered all the same.
        if request:
            _set_states(*request, reached, met, after, out, is_new)
    if retrain:
        with console.status("training without the forgotten examples"):
            retraining.retrain(own, out)
        where = f"Retrained parameters: {out / retraining.RETRAINED}"
        console.print(where, highlight=False, markup=False, soft_wrap=True)
    return met


def _set_states(path, number, reached, met, after, out, is_new):
    """Records the outcome of a request in the ledger, and reopens earlier ones that are known again."""
    # In one transaction, or two runs that end together could both be marked.
    with ledger.opened(path) as connection, ledger.transaction(connection):
        was = ledger.find(connection, number).state
        if met and was != "unlearned":
            # Another request may have been unlearned since the run began, or before this call was repeated.
            _check_order(connection, number, after)
        # A failed attempt does not undo a successful one.
        if met or was != "unlearned":
            ledger.set_state(connection, number, "unlearned" if met else "infeasible")
        # A repeated call of a finished run says nothing about what was unlearned since.
        returned = reached.get("returned", ()) if is_new or was == "open" else ()
        for run in returned:
            known = records.read(out / "asked.json", "asked")["earlier"][run - 1]["positions"]
            for other in ledger.unlearned(connection, ledger.find(connection, number).data, but=number):
                if np.isin(ledger.ids_of(connection, other), known).all():
                    ledger.set_state(connection, other, "open")


def _warn_of_other_data(connection, number, console):
    if others := ledger.unlearned_elsewhere(connection, ledger.find(connection, number).data):
        told = plans.of_other_data(others)
        console.print(f"Warning: {told}", highlight=False, markup=False, soft_wrap=True)


def plan(
    file: Path,
    forget: "Path | tuple[Path, int]",
    asked: deletion.Asked,
    requests: Path,
    epochs: int,
    after: Path | None,
    there: tuple[Mesh, Chip | None] | None,
    console: Console,
) -> None:
    """Prints what `run` would cost, here or on the devices of `topology.mesh_of`; see `service.plan.make`."""
    own = user_file.load(file, deletion.NEEDED)
    mesh, chip = there or (own.get("mesh"), None)
    ids, number = _ids(own["data"], forget), 0 if isinstance(forget, Path) else forget[1]
    with console.status("compiling a step"), fitting("use smaller batches, or more devices"):
        of_request: dict[str, Any] = {"requests": requests, "number": number, "epochs": epochs, "after": after}
        made = plans.make(own | {"mesh": mesh}, ids, asked, **of_request, device_bytes=chip and int(chip.memory))
    console.print(plans.said(made), highlight=False, markup=False, soft_wrap=True)


def _ids(data, forget):
    if isinstance(forget, Path):
        return read_ids(forget, len(as_examples("data", data)))
    return _requested(data, *forget)


def _requested(data, path, number):
    """The positions of a request; raises `ValueError` if the request is on other data."""
    with ledger.known(path) as connection:
        request = ledger.find(connection, number, "request number")
        if request.data != user_file.data_digest(data):
            raise ValueError(
                f"request: {number} is for other data than the file's, expected a request for the file's data"
            )
        return ledger.ids_of(connection, number)


def _check_order(connection, number, after):
    """Raises `ValueError` if a run would train again on what another request had unlearned."""
    gone = np.empty(0, np.int64) if after is None else folder.forgotten_by(after)
    for done in ledger.unlearned(connection, ledger.find(connection, number).data, but=number):
        if not np.isin(ledger.ids_of(connection, done), gone).all():
            raise ValueError(
                f"after: got {after}, but request {done} on these data is unlearned, and this run would train on its "
                f"examples again; expected --after with the folder of the latest run, the one that unlearned request "
                f"{done} or continued from it"
            )


def said(reached: dict, out: Path) -> str:
    """The result in a few lines."""
    level, examples = reached["level"], reached["examples"]
    percent = lambda value: _words.shown(value, reached["rates"])
    begun = reached["figures"].get("original", {}).get("forget_error")
    end = f"The target was reached{_words.given_noise(reached)} and the limit kept."
    if not reached.get("telling", True) and begun is not None and level["forget_error"] <= begun:
        end = "The limit was kept, and the error on these examples is no higher than before."
    if not reached["met"]:
        missed = "The limit was not kept" if not level["kept"] else "The target was missed within the limit"
        compared = level["comparison"]
        if level["kept"] and compared and (compared["low"] or 0) > 0:
            missed = "Too much was forgotten: the model does worse on these examples than on unseen data"
        end = (
            f"{missed}; this is the nearest point found. More steps or another limit, in another folder, may do better."
        )
        if level["target"] >= UNLIMITED:
            end = "Without `held_out` no target is known, and nothing shows whether enough was forgotten."
        elif level["kept"] and begun is not None and begun >= level["target"]:
            end = (
                f"There was nothing to forget: the error was {percent(begun)} before the run. Unseen data more similar "
                "to these examples may give another target."
            )
    if not reached.get("telling", True):
        end += (
            " Whether these examples are forgotten cannot be decided: the original model's errors on them do not "
            "differ from those on unseen data, because they are too few or were barely learned."
        )
    for number in reached.get("returned", ()):
        end += f" What earlier run {number} forgot is known again."
    if reached.get("returned"):
        end += " To forget both, start a run without --after whose --forget has the positions of both."
    load = f"from eupmu_jax.training import checkpoints; checkpoints.load({str(out / 'params')!r}, params)[0]"
    was = "" if begun is None else f"; it was {percent(begun)}"
    return (
        f"{'Forgot' if reached['met'] else 'To forget:'} {examples['forget']:,} of {sum(examples.values()):,} "
        f"examples. Their error is {percent(level['forget_error'])}{was}; {_words.aim(reached)}.\n"
        f"The error on the retain set is {percent(level['retain_error'])}; it was {percent(level['start'])}, and its "
        f"limit is {percent(level['limit'])}.\n{end}\nCheckpoints and reached.json: {out}; the parameters: {load}"
    )
