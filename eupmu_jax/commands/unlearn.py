"""`eupmu unlearn`: some of a user's own data, in his own model, from ids to parameters."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from eupmu_jax.service import deletion, read_ids, user_file
from eupmu_jax.tasks import as_examples


def run(
    file: Path, forget: Path, out: Path, after: Path | None, asked: deletion.Asked, command: str, console: Console
) -> bool:
    """Runs `deletion.run` with a progress bar and prints what was reached; returns whether that is what was asked."""
    own = user_file.load(file, deletion.NEEDED)
    ids = read_ids(forget, len(as_examples("data", own["data"])))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("unlearning", total=asked.steps)
        reached = deletion.run(own, ids, out, asked, command, after, lambda: progress.advance(bar))
    console.print(said(reached, out), highlight=False, soft_wrap=True)
    return reached["met"]


def said(reached: dict, out: Path) -> str:
    """What was reached, in a few lines."""
    level, examples = reached["level"], reached["examples"]
    percent = lambda value: f"{100 * value:.1f} %"
    interval = f" ({percent(level['unseen']['low'])} to {percent(level['unseen']['high'])})" if level["unseen"] else ""
    end = "Both hold."
    if not reached["met"]:
        end = "Both could not be had; this is the nearest point found. More steps or a higher limit may do better."
    return (
        f"Forgot {examples['forget']:,} of {sum(examples.values()):,} examples: their error is "
        f"{percent(level['forget_error'])}, aimed at {percent(level['target'])}, that of {level['source']}{interval}.\n"
        f"The error on the others is {percent(level['retain_error'])}; it was {percent(level['start'])}, and its limit "
        f"is {percent(level['limit'])}.\n{end}\nParameters, checkpoints and reached.json: {out}"
    )
