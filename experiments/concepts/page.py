"""The page of concepts: what models draw for every word, and a picture of the erased word and its neighbours."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from experiments import parts
from experiments.concepts import models, run

REFERENCES = ("original", "retrained")
ERASED, *KEPT = models.CONCEPTS
TITLES = {"original": "before", run.TOLD: "EUPMU,\ntold the level"}


def blocks() -> dict[str, str]:
    """Figures of every model, and sentences about them."""
    found = parts.newest(rows.read(run.ROWS), "model", "seed")
    methods = [row["model"] for row in found if row["model"] not in REFERENCES]
    head = [*models.CONCEPTS, "others", f"{ERASED}, word learned again", "rise", "forget loss", "% of retraining"]
    return {
        "concepts": parts.table(["", *head], [[name, *_figures(_of(found, name))] for name in (*REFERENCES, *methods)]),
        "concepts said": parts.paragraph(_said(found)),
    }


def draw(folder: Path) -> None:
    """Draws samples of the models for the erased word and three neighbours, from the same noise."""
    kept = np.load(run.SAMPLES)
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(10.4, 1.3 * len(run.PICTURED) + 0.3), layout="constrained")
        panels = figure.subplots(len(run.PICTURED), len(run.NEIGHBOURS))
        for line, name in zip(panels, run.PICTURED, strict=True):
            for axes, word, images in zip(line, run.NEIGHBOURS, kept[name], strict=True):
                axes.imshow(_tiled(images), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                axes.spines[:].set_visible(word == ERASED)
                axes.spines[:].set_color("#b3261e")
            line[0].set_ylabel(TITLES.get(name, name), rotation=0, ha="right", va="center", fontsize=9)
        for axes, word in zip(panels[0], run.NEIGHBOURS, strict=True):
            axes.set_title(f"“{word}”" + (", erased" if word == ERASED else ""), fontsize=9)
        parts.save_samples(figure, folder / "concepts.png")


def _tiled(images):
    """Eight images in two rows, with white margins."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return np.concatenate([np.concatenate(list(padded[k : k + 4]), axis=1) for k in (0, 4)])


def _of(found, name):
    (row,) = rows.select(found, model=name, seed=run.SEED)
    return row


def _others(row):
    return np.mean([row["shown"][word] for word in KEPT])


def _figures(row):
    share = row.get("share_of_retraining")
    return [
        *(f"{row['shown'][word]:.0f}" for word in models.CONCEPTS),
        f"{_others(row):.1f}",
        f"{row['relearned']:.0f}",
        f"{row['rise']:.4f}",
        f"{row['forget_loss']:.3f}",
        "-" if share is None else f"{share:.0f}",
    ]


def _said(found):
    names = ("original", "retrained", "EUPMU", run.TOLD)
    before, wanted, ours, told = (_of(found, name) for name in names)
    drawn, again = (lambda row: f"{row['shown'][ERASED]:.0f} %"), (lambda row: f"{row['relearned']:.0f} %")
    kept = "within" if max(ours["rise"] - ours["limit"], told["rise"] - told["limit"]) <= 0 else "not both within"
    return (
        f"Prompted for a flag, the original model draws one in {drawn(before)} of its samples, the retrained model in "
        f"{drawn(wanted)}, EUPMU in {drawn(ours)}, and EUPMU told the level in {drawn(told)}. After the embedding of "
        f"the word is retrained on flags, these are {again(before)}, {again(wanted)}, {again(ours)} and "
        f"{again(told)}. For prompts of the other concepts, {_others(before):.1f} %, {_others(wanted):.1f} %, "
        f"{_others(ours):.1f} % and {_others(told):.1f} % of the samples show the right one. EUPMU's losses on these "
        f"concepts are {kept} its limit, a rise of {ours['limit']:.4f}; its target is a loss of {ours['target']:.3f} "
        f"on flags, and the retrained model's is {wanted['forget_loss']:.3f}. The classifier is right on "
        f"{before['judge']:.0f} % of the real emoji that it was not trained on."
    )
