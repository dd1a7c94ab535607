"""`eupmu demo --data digits-diffusion`: a diffusion model forgets a class, beside one retrained without it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from eupmu_jax.benchmark import diffusion
from eupmu_jax.benchmark import rows as saved_rows
from eupmu_jax.benchmark.problems import RETRAINED_SEED_OFFSET
from eupmu_jax.commands import demo, diffusion_page
from eupmu_jax.commands._command_line import command_line
from eupmu_jax.training import checkpoints
from eupmu_jax.training._alone import alone
from eupmu_jax.training.levels import measured_level
from eupmu_jax.training.unlearning import unlearn

NAME = "digits-diffusion"
METHODS = ("weighted sum", "EUPMU")
# Fewer than in the experiment, as the demo is to end within five minutes.
EPOCHS = 60
STEPS, FORGET_BATCH, RETAIN_BATCH, PROBES = 150, 32, 96, 4


def run(forget: str, seed: int, out: Path, console: Console) -> list[dict]:
    """Trains, unlearns, evaluates, prints a table, and writes rows, checkpoints and a page to `out`.

    Every method runs with its default settings.

    Args:
      forget: "class:N".
      seed: Seed of the models, methods and samples.
      out: Folder for `rows.jsonl`, `report.html`, `checkpoints/` and the cache `models/` of trained models.
      console: Where progress and the table are printed.

    Returns:
      The rows: original, retrained, then one for each method.

    Raises:
      ValueError: Before any work, for a class that digits do not have, or a folder that is unwritable or has rows of
        something else.
    """
    if not re.fullmatch(r"class:\d", forget):
        raise ValueError(f"forget: got {forget!r}, expected a class from class:0 to class:9")
    demo.check_folder(seed, out)
    demo.check_rows(out, lambda row: row.get("data") == NAME)
    with alone(out):
        return _run(forget, seed, out, console)


def _run(forget, seed, out, console):
    forgotten = int(forget.split(":")[1])
    forget_set, retain_set = diffusion.sets(forgotten)
    everything = np.arange(len(diffusion.digits()["labels"]))
    with demo.progress_of(console) as progress:

        def train(description, ids, init_seed):
            with demo.bar(progress, description, diffusion.steps_of(ids, EPOCHS)) as advance:
                return diffusion.train(ids, init_seed, out / "models", EPOCHS, advance)

        original = train("original model", everything, seed)
        retrained = train("retrained model", retain_set.ids, seed + RETRAINED_SEED_OFFSET)
        level = lambda params, part: measured_level(diffusion.plain_task(), params, part).error
        start, rows, images = level(original.params, retain_set), [], {}

        def add(method, params, seconds, **more):
            losses = {"forget_loss": level(params, forget_set), "retain_loss": level(params, retain_set)}
            figures = diffusion.judge(params, forgotten, seed)
            figures |= {"relearned": diffusion.ua(diffusion.relearned_row(params, forgotten, seed), forgotten, seed)}
            asked = {"method": method, "data": NAME, "forget": forget, "seed": seed}
            spent = {"seconds": seconds, "share_of_retraining": 100 * seconds / retrained.seconds}
            made_by = saved_rows.provenance(command_line())
            rows.append(asked | figures | losses | {"rise": losses["retain_loss"] - start} | spent | more | made_by)
            images[method] = _samples(params, seed)

        add("original", original.params, original.seconds)
        add("retrained", retrained.params, retrained.seconds)
        task = diffusion.task(original.params)
        for method in METHODS:
            with demo.bar(progress, method, STEPS) as advance:
                result = unlearn(
                    method,
                    task,
                    original.params,
                    forget_set,
                    retain_set,
                    steps=STEPS,
                    seed=seed,
                    forget_batch=FORGET_BATCH,
                    retain_batch=RETAIN_BATCH,
                    probes=PROBES,
                    warm=True,
                    on_step=advance,
                )
            more: dict[str, Any] = {"history": result.history}
            if (reached := result.level) is not None:
                more |= {"level": {"target": reached.target, "limit": reached.limit}}
                more |= {"limit": reached.limit - reached.start}
            add(method, result.params, result.seconds, **more)
            folder = out / "checkpoints" / method.replace(" ", "-")
            checkpoints.save(folder, result.params, {"method": method, "data": NAME, "forget": forget, "seed": seed})

    rows = demo.saved(rows, out, lambda rows: diffusion_page.render(rows, images))
    demo.show(f"{NAME}: forget {forget}, seed {seed}", rows, [rows[-1]], diffusion_page, out, console)
    return rows


def _samples(params, seed):
    count = diffusion_page.SHOWN[0] * diffusion_page.SHOWN[1]
    labels = np.repeat(np.arange(diffusion.CLASSES), count)
    return np.asarray(diffusion.samples(params, labels, seed)).reshape(diffusion.CLASSES, count, *diffusion.SHAPE[:2])
