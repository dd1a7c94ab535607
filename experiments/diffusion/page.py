"""The page of diffusion: figures of models and methods, what attacks bring back, and a picture of samples."""

from pathlib import Path

import numpy as np

from eupmu_jax.benchmark import rows, tuning
from eupmu_jax.commands import diffusion_page
from experiments import parts
from experiments.diffusion import run

ROWS, SAMPLES = (Path(__file__).with_name(name) for name in ("rows.jsonl", "samples.npz"))
REFERENCES = ("original", "retrained", "copied row")
FIGURES = {"UA": 1, "RA": 1, "FD": 1, "rise": 4, "forget_loss": 3, "share_of_retraining": 1}
HEAD = ["UA", "RA", "FD", "rise", "forget loss", "% of retraining"]
TRIALS = ["runs", "UA off by", "at most", "least RA", "rise", "at most", "FD", "UA, row relearned", "as retrained"]
# A run is as good as retraining if its UA is that of the retrained model and its RA that of the original, to so many
# points. UA of 256 samples is known to 1.2 points at 96 %.
UA_POINTS, RA_POINTS = 2.0, 1.0


def blocks() -> dict[str, str]:
    """Figures of the models that are no trial, all trials by method, and attacks."""
    found = rows.read(ROWS)
    fixed = [(model, "") for model in REFERENCES] + [("EUPMU", tuning.UNTUNED)]
    methods = list(dict.fromkeys(row["model"] for row in found if row["model"] not in REFERENCES))
    attacks = list(found[0]["attacks"])
    attacked = [(method, 0) for method in methods]
    return {
        "diffusion": parts.table(["", *HEAD], [[_name(key), *_figures(_of(found, key))] for key in fixed]),
        "diffusion trials": parts.table(
            ["", *TRIALS],
            [[method, *_trials(found, method)] for method in sorted(methods, key=lambda m: _median_gap(found, m))],
        ),
        "diffusion attacks": parts.table(
            ["", "UA", *attacks, "off by"],
            [[_name(key), *_attacked(found, key, attacks)] for key in fixed + attacked],
        ),
        "diffusion said": parts.paragraph(_said(found)),
        "diffusion in short": parts.paragraph(_short(found)),
    }


def draw(folder: Path) -> None:
    """What models draw for every class, from the same noise; the first class is the forgotten one."""
    kept = np.load(SAMPLES)
    images = {name.replace(", 0", ""): kept[name] / 127.5 - 1 for name in kept}
    folder.mkdir(parents=True, exist_ok=True)
    figure = diffusion_page.grid(images, run.forgotten_of(0))
    figure.savefig(folder / "diffusion.png", dpi=110, metadata={"Software": None})


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
    return float(np.median([_gap(found, row) for row in _trials_of(found, method)]))


def _trials_of(found, method):
    return [row for row in rows.select(found, model=method) if row["trial"] != tuning.UNTUNED]


def _as_retrained(found, row):
    near = _gap(found, row) <= UA_POINTS
    return near and row["RA"] >= _reference(found, row, "original")["RA"] - RA_POINTS


def _trials(found, method):
    mine = _trials_of(found, method)
    gaps, rises = [_gap(found, row) for row in mine], [parts.number(row["rise"]) for row in mine]
    return [
        str(len(mine)),
        f"{np.median(gaps):.1f}",
        f"{max(gaps):.1f}",
        f"{min(row['RA'] for row in mine):.1f}",
        f"{np.median(rises):.4f}",
        f"{max(rises):.4f}",
        f"{np.median([row['FD'] for row in mine]):.1f}",
        f"{np.median([row['attacks']['embedding'] for row in mine]):.1f}",
        str(sum(_as_retrained(found, row) for row in mine)),
    ]


def _attacked(found, key, attacks):
    """UA, UA after each attack, and the mean distance of all of these to the retrained model's."""
    after = lambda row: np.array([row["UA"], *(row["attacks"][name] for name in attacks)])
    mine = _of(found, key)
    off = np.mean([np.abs(after(row) - after(_reference(found, row, "retrained"))) for row in mine])
    return [f"{value:.1f}" for value in (*np.mean([after(row) for row in mine], axis=0), off)]


def _said(found):
    untuned = _of(found, ("EUPMU", tuning.UNTUNED))
    limited = [row for row in found if row["model"] == "EUPMU"]
    kept = sum(row["rise"] <= row["limit"] for row in limited)
    gaps = ", ".join(f"{_gap(found, row):.1f}" for row in untuned)
    return (
        f"EUPMU without settings ends {gaps} points from the retrained model's UA (seeds {_seeds(found)}). Of its "
        f"{len(limited)} runs, tuned or not, {kept} keep the limit on the denoising loss."
    )


def _short(found):
    ours, wanted = _of(found, ("EUPMU", tuning.UNTUNED)), _of(found, ("retrained", ""))
    mean = lambda mine, get: f"{np.mean([get(row) for row in mine]):.0f}"
    ua, row = (lambda row: row["UA"]), (lambda row: row["attacks"]["embedding"])
    return (
        f"Asked for the forgotten class, a model of digits unlearned by untuned EUPMU draws another digit "
        f"{mean(ours, ua)} % of the time (retrained: {mean(wanted, ua)} %), and {mean(ours, row)} % once the class's "
        f"row of the embedding was trained again (retrained: {mean(wanted, row)} %)."
    )


def _seeds(found):
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in found}))
