"""The page of the classification benchmark, from `rows.jsonl` and, for the later runs, `again/rows.jsonl`."""

import itertools
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np

from eupmu_jax import metrics
from eupmu_jax.benchmark import figures, saved, summary, tables, tuning
from eupmu_jax.benchmark.designs import DESIGNS, Case, Design
from eupmu_jax.training.relearning import Curve, area_between
from experiments import parts
from experiments.classification import aims, run, trials

FOLDER = Path(__file__).parent
ROWS = FOLDER / "rows.jsonl"
# Some methods repeated from scratch on other seeds.
AGAIN = FOLDER / "again" / "rows.jsonl"
# The seeds of the later runs: those of all repeated methods, then those of EUPMU alone.
SEEDS = tuple(tuple(map(int, seeds)) for seeds in (run.SEEDS, run.FRESH))
SHOWN = ("fashion_mnist-cnn", "fashion_mnist-resnet", "emoji-resnet")
EUPMU = (f"EUPMU, {tuning.UNTUNED}", "EUPMU", "EUPMU budget")
DESIGN_NAMES = {"fashion_mnist-cnn": "small CNN", "fashion_mnist-resnet": "ResNet", "emoji-resnet": "emoji, ResNet"}
KINDS = {"random:10%": "10 % at random", "random:50%": "50 % at random", "class:{}": "a class"}


def shown() -> list[tuple[str, Design, Case]]:
    """The designs and cases that the page has tables of."""
    return [(name, DESIGNS[name], case) for name in SHOWN for case in DESIGNS[name].cases]


def blocks() -> dict[str, str]:
    """For every case: gaps, all trials, and attacks with relearning; then the summaries."""
    found, made = saved.read(ROWS), {}
    for name, design, case in shown():
        lines = summary.lines_of(found, name, design, case)
        made[f"benchmark {name} {case.forget}"] = tables.markdown(lines, len(design.seeds))
        made[f"attacks {name} {case.forget}"] = attacks(lines)
        made[f"trials {name} {case.forget}"] = trials.table(found, name, design, case)
    made |= aims.blocks(found, [(_named(name, case), name, design, case) for name, design, case in shown()])
    said = trials.in_short(found, shown(), "EUPMU") + made.pop("benchmark aims in short")
    made["benchmark in short"] = f"{in_short(found)}\n{parts.paragraph(' '.join(said.split()))}"
    made["benchmark again"] = again(found, saved.read(AGAIN))
    made["benchmark cost"] = cost(found)
    return made


def _named(name, case):
    return f"{DESIGN_NAMES[name]}, {KINDS[case.forget]}"


def draw(folder: Path) -> None:
    """Draws the trade-off, gaps and relearning of each design."""
    with matplotlib.rc_context(parts.TEXT):
        for path in [path for name in SHOWN for path in figures.draw(name, FOLDER, folder)]:
            path.write_text(parts.slim(path.read_text()))


def attacks(lines):
    """MIA by each feature, test-UA, KL on the test set, and how much more is relearned than by the retrained model."""
    retrained = {row["seed"]: row for line in lines if line.name == "retrained" for row in line.rows}
    features = (feature.replace("_", " ") for feature in metrics.FEATURES)
    head = ["", *features, "test UA", "KL, test", "relearned", "by retaining"]
    body = []
    for line in lines:
        mean = lambda value, line=line: np.mean([value(row) for row in line.rows])
        area = lambda side: lambda row: area_between(_curve(row, side), _curve(retrained[row["seed"]], side))
        body.append(
            [
                line.name,
                *(f"{mean(lambda row, f=feature: parts.number(row['mia'][f])):.1f}" for feature in metrics.FEATURES),
                f"{line.figures['test_UA']:.1f}" if "test_UA" in line.figures else "",
                f"{line.figures['kl_test']:.2f}",
                *(f"{mean(area(side)):+.1f}" for side in ("forget_side", "retain_only")),
            ]
        )
    return parts.table(head, body)


def _curve(row, side):
    return Curve(*(np.array(row["relearning"][side][field]) for field in ("step", "accuracy")))


def in_short(found: list[dict]) -> str:
    """For each case: the smallest gap and the rank of EUPMU, by the gap and by the median over all trials."""
    body = []
    for name, design, case in shown():
        everything = summary.lines_of(found, name, design, case)
        lines = [line for line in everything if line.name not in ("original", "retrained")]
        if not lines:
            continue
        tuned = [line for line in lines if line.trials]
        medians = sorted(tuned, key=lambda line: np.median(line.trials))
        figure = lambda line: f"{line.figures['gap']:.2f}{'*' if line.tied else ''}"
        median = lambda line: f"{np.median(line.trials):.2f}"
        cells = [_named(name, case), f"{everything[0].figures['gap']:.2f}"]
        for ranked, show, names in ((lines, figure, EUPMU), (medians, median, EUPMU[1:])):
            places = {line.name: f"{show(line)} ({number})" for number, line in enumerate(ranked, 1)}
            cells += [f"{show(ranked[0])} ({ranked[0].name})", *(places.get(name, "") for name in names)]
        body.append(cells)
    head = ["", "original", "least gap", *EUPMU, "least median", *(f"{name}, median" for name in EUPMU[1:])]
    return parts.table(head, body)


def again(first, second):
    """The gaps of later runs on other seeds beside the intervals of the first."""
    body, inside = [], 0
    for seeds, (name, design, case) in itertools.product(SEEDS, shown()):
        once = {line.name: line for line in summary.lines_of(first, name, design, case)}
        for line in summary.lines_of(second, name, design._replace(seeds=seeds), case):
            before = once.get(line.name)
            if line.name == "retrained" or before is None or before.gap is None or line.gap is None:
                continue
            _, low, high = before.gap
            means = np.mean(before.gaps), np.mean(line.gaps)
            error = np.hypot(*(np.std(gaps, ddof=1) / np.sqrt(len(gaps)) for gaps in (before.gaps, line.gaps)))
            inside += low <= means[1] <= high
            body.append(
                [
                    line.name,
                    _named(name, case),
                    f"{means[0]:.2f}",
                    f"{low:.2f} to {high:.2f}",
                    ", ".join(map(str, seeds)),
                    f"{means[1]:.2f}",
                    "yes" if low <= means[1] <= high else "no",
                    f"{(means[1] - means[0]) / error:+.1f}",
                ]
            )
    head = ["", "forget", "gap", "95 %", "seeds", "again", "inside", "difference, standard errors"]
    return parts.table(head, body) + f"\n{inside} of {len(body)} later means lie inside the first interval.\n"


def cost(found):
    """What the rows cost, and on which devices."""
    mine = [row for row in found if row["design"] in SHOWN]
    devices = ", ".join(sorted({f"{row['device']}, {row['cores']} core for each process" for row in mine}))
    # All cases of a seed share one original model, which has a row in each of them.
    one = lambda row: (row["design"], row["seed"], row["split"] if row["model"] == "retrained" else None)
    models = {one(row): row for row in mine if row["kind"] == "model"}
    trials, runs = ([row for row in mine if row["kind"] == kind] for kind in ("trial", "run"))
    hours = sum(row["processor_seconds"] for row in models.values()) / 3600
    over = Counter((row["design"], row["forget"]) for row in runs if row["share_of_retraining"] > 5)
    text = (
        f"{len(models)} trained models ({hours:.1f} hours of one core), {len(trials):,} trials and {len(runs):,} runs "
        f"({devices}). The median run took {np.median([row['share_of_retraining'] for row in runs]):.1f} % of the time "
        f"of retraining, and {over.total()} runs took more than 5 %"
    )
    for (design, forget), of_most in over.most_common(1):
        text += f", {of_most} of them those of {DESIGN_NAMES[design]}, {KINDS[forget]}"
    return parts.paragraph(f"{text}.")
