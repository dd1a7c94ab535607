"""The page of diffusion: figures of models and methods, what attacks bring back, and a picture of samples."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows, tuning
from experiments import parts

ROWS, SAMPLES = (Path(__file__).with_name(name) for name in ("rows.jsonl", "samples.npz"))
REFERENCES = ("original", "retrained", "copied row")
FIGURES = {"UA": 1, "RA": 1, "FD": 1, "rise": 4, "forget_loss": 3, "share_of_retraining": 1}
HEAD = ["UA", "RA", "FD", "rise", "forget loss", "% of retraining"]
# A run is as good as retraining if its UA is that of the retrained model and its RA that of the original, to so many
# points. UA of 256 samples is known to 1.2 points at 96 %.
UA_POINTS, RA_POINTS = 2.0, 1.0


def blocks() -> dict[str, str]:
    """Figures of the models that are no trial, all trials by method, and attacks."""
    found = rows.read(ROWS)
    fixed = [(model, "") for model in REFERENCES] + [("EUPMU", tuning.UNTUNED)]
    methods = list(dict.fromkeys(row["model"] for row in found if row["model"] not in REFERENCES))
    best = [(method, nearest(found, method)) for method in methods if method != "EUPMU"]
    attacks = list(found[0]["attacks"])
    return {
        "diffusion": parts.table(["", *HEAD], [[_name(key), *_figures(_of(found, key))] for key in fixed]),
        "diffusion trials": parts.table(
            [
                "",
                "runs",
                "UA off by, median",
                "most",
                "RA, least",
                "rise, median",
                "most",
                "FD, median",
                "as retrained",
            ],
            [[method, *_trials(found, method)] for method in sorted(methods, key=lambda m: _median_gap(found, m))],
        ),
        "diffusion attacks": parts.table(
            ["", "UA", *attacks], [[_name(key), *_attacked(_of(found, key), attacks)] for key in fixed + best]
        ),
        "diffusion said": parts.paragraph(_said(found)),
    }


def draw(folder: Path) -> None:
    """What models draw for every class, from the same noise, one row of images for each model."""
    kept = np.load(SAMPLES)
    seed = min(int(name.split()[0]) for name in kept)
    names = [name for name in kept if name.startswith(f"{seed} ")]
    forgotten = int(next(row for row in rows.read(ROWS) if row["seed"] == seed)["forget"].split(":")[1])
    order = [forgotten, *(c for c in range(10) if c != forgotten)]
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(9, 1.15 * len(names)))
        axes = figure.subplots(len(names), 1)
        for axis, name in zip(axes, names, strict=True):
            images = kept[name][order]
            axis.imshow(np.concatenate([_block(group) for group in images], axis=1), cmap="gray_r", vmin=0, vmax=255)
            axis.set_ylabel(name.split(" ", 1)[1].replace(" 0", ""), rotation=0, ha="right", va="center")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_title(
            f"asked for {forgotten}, which is to go, and for {', '.join(map(str, order[1:]))}", loc="left"
        )
        parts.save(figure, folder / "diffusion.svg")


def nearest(found: list[dict], method: str) -> int:
    """The trial of a method whose UA is nearest to the retrained model's, in the mean over the seeds."""
    trials = sorted({row["trial"] for row in rows.select(found, model=method)} - {tuning.UNTUNED})
    return min(trials, key=lambda trial: np.mean([_gap(found, row) for row in _of(found, (method, trial))]))


def _block(images):
    """A class's images, two rows of three, with a margin."""
    grid = np.pad(images, ((0, 0), (1, 1), (1, 1))).reshape(2, 3, 10, 10)
    return np.pad(grid.transpose(0, 2, 1, 3).reshape(20, 30), ((0, 0), (2, 2)))


def _of(found, key):
    return rows.select(found, model=key[0], trial=key[1])


def _name(key):
    return key[0] if key[1] == "" else f"{key[0]}, {key[1] if isinstance(key[1], str) else f'trial {key[1]}'}"


def _figures(mine):
    return [f"{np.mean([row[name] for row in mine]):.{d}f}" if name in mine[0] else "-" for name, d in FIGURES.items()]


def _reference(found, row, model):
    return rows.select(found, model=model, seed=row["seed"])[0]


def _gap(found, row):
    return abs(row["UA"] - _reference(found, row, "retrained")["UA"])


def _median_gap(found, method):
    return float(np.median([_gap(found, row) for row in rows.select(found, model=method)]))


def _as_retrained(found, row):
    near = _gap(found, row) <= UA_POINTS
    return near and row["RA"] >= _reference(found, row, "original")["RA"] - RA_POINTS


def _trials(found, method):
    mine = [row for row in rows.select(found, model=method) if row["trial"] != tuning.UNTUNED]
    gaps, rises = [_gap(found, row) for row in mine], [parts.number(row["rise"]) for row in mine]
    return [
        str(len(mine)),
        f"{np.median(gaps):.1f}",
        f"{max(gaps):.1f}",
        f"{min(row['RA'] for row in mine):.1f}",
        f"{np.median(rises):.4f}",
        f"{max(rises):.4f}",
        f"{np.median([row['FD'] for row in mine]):.1f}",
        str(sum(_as_retrained(found, row) for row in mine)),
    ]


def _attacked(mine, attacks):
    figures = [[row["UA"] for row in mine], *([row["attacks"][name] for row in mine] for name in attacks)]
    return [f"{np.mean(values):.1f}" for values in figures]


def _said(found):
    untuned = _of(found, ("EUPMU", tuning.UNTUNED))
    limited = [row for row in found if row["model"] == "EUPMU"]
    kept = sum(row["rise"] <= row["limit"] for row in limited)
    gaps = ", ".join(f"{_gap(found, row):.1f}" for row in untuned)
    return (
        f"EUPMU without settings ends {gaps} points from the retrained model's UA (seeds {_seeds(found)}). Of its "
        f"{len(limited)} runs, tuned or not, {kept} keep the limit on the denoising loss."
    )


def _seeds(found):
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in found}))
