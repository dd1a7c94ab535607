"""The page of persons: tables of models and methods, two figures, and answers before and after."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from eupmu_jax.metrics import privleak
from eupmu_jax.metrics.language import forget_quality
from experiments import parts
from experiments.persons import over_time, paths, tune
from experiments.persons.compared import (
    distance,
    first_seed,
    keeps_utility,
    name_of,
    quality_of,
    reference,
    rows_of,
    utility_kept,
)
from experiments.persons.tune import KEPT

ROWS = Path(__file__).with_name("rows.jsonl")
REFERENCES = ("pretrained", "original", "retrained")
HEAD = ["probability", "ROUGE-L", "extraction", "error", "taught again", "off by", "quality", "utility", "RE"]
# Older rows lack these.
LATER = ["PrivLeak", "error, int4", "RE, int4"]
SHOWN = ("original", "retrained", "EUPMU")
OURS = ("EUPMU", "bounded_ascent")
BY_SEED = ["quality by seed", "utility kept"]
OF_TRIALS = ["off by, all trials", "utility kept, all trials"]
KINDS = ("forgotten", "retained", "the world")


def blocks() -> dict[str, str]:
    """Tables and sentences about every model as means over the seeds, with the best first, and answers."""
    found = parts.newest(rows.read(ROWS), "model", "objective", "seed")
    first = first_seed(found)
    return {
        "persons": _table(found, _keys(found)),
        "persons said": parts.paragraph(_said(found)),
        "persons why": parts.paragraph(_why(found)),
        "persons later": _later(found),
        "persons over time": paths.table(first, over_time.of_now(rows.read(over_time.ROWS))),
        **_tuned(found, rows.read(tune.TRIALS_FILE)),
        "persons in short": parts.paragraph(_short(found)),
        "persons answers": _answers(found),
    }


def draw(folder: Path) -> None:
    """Draws where all runs end, and the paths of some."""
    found = parts.newest(rows.read(ROWS), "model", "objective", "seed")
    _draw_ends(found, folder / "persons.svg")
    saved = over_time.of_now(rows.read(over_time.ROWS))
    paths.draw(first_seed(found), saved, folder / "persons_over_time.svg")


def _draw_ends(found, path):
    """Error on forgotten persons, forget quality and utility: a line for each model, a point for each seed."""
    keys = [key for key in _keys(found) if key[0] != "pretrained"][::-1]
    figures = (
        ("error on forgotten persons, %", lambda row: 100 * row["error"]["forget"]),
        ("forget quality, log10 p", lambda row: quality_of(found, row)),
        ("utility, % of the original model's", lambda row: 100 * utility_kept(found, row)),
    )
    marks = (
        [100 * row["held_out_error"] for row in rows_of(found, ("original", ""))],
        [0.0],
        [100 * (1 - KEPT)],
    )
    with matplotlib.rc_context(parts.STYLE):
        figure = Figure(figsize=(10.4, 0.34 * len(keys) + 1.0), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (title, value), mark in zip(panels, figures, marks, strict=True):
            for place, key in enumerate(keys):
                color = "#111418" if key[0] in REFERENCES else "#0b6e4f" if key[0] == "EUPMU" else "#9aa0a8"
                mine = [value(row) for row in rows_of(found, key)]
                axes.plot(mine, [place] * len(mine), "o", ms=7, color=color, clip_on=False)
            axes.axvline(np.mean(mark), color="#0b6e4f", ls="--", lw=1)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_ylim(-0.6, len(keys) - 0.4)
        panels[0].set_yticks(range(len(keys)), [name_of(key) for key in keys])
        panels[2].set_xlim(left=0)
        parts.save(figure, path)


def _keys(found):
    """The reference models, then the methods, with the best first."""
    methods = sorted(_methods(found), key=lambda key: _order(found, key))
    return [*((model, "") for model in REFERENCES), *methods]


def _methods(found):
    return list(dict.fromkeys((row["model"], row["objective"]) for row in found if row["model"] not in REFERENCES))


def _order(found, key):
    """Sorts methods that keep utility first, and then by forget quality."""
    mine = rows_of(found, key)
    return (
        not all(keeps_utility(found, row) for row in mine),
        -np.mean([quality_of(found, row) for row in mine]),
    )


def _later(found):
    """The figures of `LATER`, for the models of which every row has them."""
    lines = []
    for key in _keys(found):
        mine = rows_of(found, key)
        if all("int4" in row for row in mine):
            leaks = [privleak(row["separation"], reference(found, row, "retrained")["separation"]) for row in mine]
            coarse = [100 * np.mean([row["int4"][part] for row in mine]) for part in ("forget", "retain")]
            lines.append([name_of(key), *(f"{figure:.1f}" for figure in (np.mean(leaks), *coarse))])
    return parts.table(["", *LATER], lines)


def _figures(found, key):
    mine = rows_of(found, key)
    mean = lambda get: np.mean([get(row) for row in mine])
    return [
        f"{mean(lambda row: row['probability']):.3f}",
        f"{mean(lambda row: row['rouge']):.3f}",
        f"{mean(lambda row: row['extraction']):.3f}",
        f"{100 * mean(lambda row: row['error']['forget']):.1f}",
        f"{100 - mean(lambda row: row['relearned']['after']):.1f}",
        f"{mean(lambda row: distance(found, row)):.1f}",
        f"{mean(lambda row: quality_of(found, row)):.1f}",
        f"{mean(lambda row: row['utility']):.3f}",
        f"{100 * mean(lambda row: row['error']['retain']):.1f}",
    ]


def _table(found, keys):
    """The means over the seeds, with the forget quality of each seed."""
    return parts.table(
        ["", *HEAD, *BY_SEED], [[name_of(key), *_figures(found, key), *_by_seed(found, key)] for key in keys]
    )


def _by_seed(found, key):
    """The forget quality under each seed, and the number of seeds under which utility is kept."""
    mine = sorted(rows_of(found, key), key=lambda row: row["seed"])
    qualities = ", ".join(f"{row['seed']}: {quality_of(found, row):.1f}" for row in mine)
    return [qualities, f"{sum(keeps_utility(found, row) for row in mine)} of {len(mine)}"]


def _tuned(found, trials):
    """The selected trial of each method under the first seed, with the range over all its trials.

    Methods with missing trials are left out.
    """
    references = [row for row in first_seed(found) if row["model"] in REFERENCES]
    tried = {key: tune.tried(found, trials, key) for key in tune.TUNED}
    tried = {key: rows for key, rows in tried.items() if len(rows) == 1 + len(tune.TRIALS)}
    if not tried:
        return {}
    tuned = references + [tune.chosen(found, trials, key) for key in tried]
    keys = [key for key in _keys(tuned) if key in tried]
    lines = [
        [name_of(key), *_settings(rows_of(tuned, key)[0]), *_figures(tuned, key), *_of_all(found, tried[key])]
        for key in keys
    ]
    return {
        "persons tuned": parts.table(["", "settings", *HEAD, *OF_TRIALS], lines),
        "persons tuned said": parts.paragraph(_said_of_tuned(found, tuned, tried, keys)),
        **_confirmed(found, trials, [*tried]),
    }


def _confirmed(found, trials, keys):
    """The selected trials under the seeds that took no part in the selection and have rows of all these methods."""
    chosen = {key: tune.chosen(found, trials, key)["trial"] for key in keys}
    # `run.py` makes the rows of the middle.
    of = {
        key: rows_of(found, key) if trial is None else tune.of_now(rows.select(rows_of(trials, key), trial=trial))
        for key, trial in chosen.items()
    }
    others = {row["seed"] for row in found} - {min(row["seed"] for row in found)}
    seeds = set.intersection(others, *({row["seed"] for row in mine} for mine in of.values()))
    if not seeds:
        return {"persons confirmed": "", "persons confirmed said": ""}
    references = [row for row in found if row["model"] in REFERENCES]
    made = [row for row in (*references, *(row for mine in of.values() for row in mine)) if row["seed"] in seeds]
    shown = [key for key in _keys(made) if key[0] != "pretrained"]
    return {
        "persons confirmed": _table(made, shown),
        "persons confirmed said": parts.paragraph(_said_of_confirmed(made, keys, sorted(seeds))),
    }


def _said_of_confirmed(made, keys, seeds):
    off = {key: np.mean([distance(made, row) for row in rows_of(made, key)]) for key in keys}
    near, after = sorted(off, key=lambda key: off[key])[:2]
    keeping = [key for key in keys if all(keeps_utility(made, row) for row in rows_of(made, key))]
    quality = lambda key: np.mean([quality_of(made, row) for row in rows_of(made, key)])
    best = f"; of these the best forget quality, {max(map(quality, keeping)):.1f}, is that of" if keeping else ""
    best += f" {name_of(max(keeping, key=quality))}" if keeping else ""
    under = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]}"
    return (
        f"Under {under}, {name_of(near)} is nearest to the retrained model, {off[near]:.1f} points off, before "
        f"{name_of(after)} with {off[after]:.1f}. {len(keeping)} of {len(keys)} methods keep utility"
        f"{' in each seed' if len(seeds) > 1 else ''}{best}. EUPMU {'keeps' if OURS in keeping else 'does not keep'} "
        f"it; its forget quality, {quality(OURS):.1f}, is number "
        f"{1 + sum(quality(key) > quality(OURS) for key in keys)}."
    )


def _settings(row):
    """The numbers among a row's settings, and whether they are the middle of their ranges."""
    numbers = ", ".join(f"{value:g}" for value in row["settings"].values() if not isinstance(value, str))
    return [numbers + (" (middle)" if row["trial"] is None else "")]


def _of_all(found, trials):
    """The range of distances over all trials of a method, and the number of trials that keep utility."""
    off = [distance(found, row) for row in trials]
    return [
        f"{min(off):.1f} to {max(off):.1f}",
        f"{sum(keeps_utility(found, row) for row in trials)} of {len(trials)}",
    ]


def _said_of_tuned(found, tuned, tried, keys):
    of = {key: rows_of(tuned, key)[0] for key in keys}
    keeping = [key for key in keys if keeps_utility(found, of[key])]
    best = max(keeping, key=lambda key: quality_of(found, of[key]))
    nearest = min(keys, key=lambda key: distance(found, of[key]))
    worst = {key: max(distance(found, row) for row in rows) for key, rows in tried.items()}
    steadiest = min(worst, key=lambda key: worst[key])
    return (
        f"Of {len(keys)} methods, tuned alike, {len(keeping)} keep utility within 1 %. Of these the best forget "
        f"quality, {quality_of(found, of[best]):.1f}, is that of {name_of(best)}; EUPMU has "
        f"{quality_of(found, of[OURS]):.1f}. The selected trial of {name_of(nearest)} is nearest to the retrained "
        f"model, {distance(found, of[nearest]):.1f} points off. The worst trial of {name_of(steadiest)} is nearer than "
        f"that of any other method, {worst[steadiest]:.1f} points off."
    )


def _said(found):
    methods = _methods(found)
    keeping = [key for key in methods if all(keeps_utility(found, row) for row in rows_of(found, key))]
    mean = lambda key: np.mean([quality_of(found, row) for row in rows_of(found, key)])
    best = max(keeping, key=mean)
    level = f"{100 * np.mean([row['held_out_error'] for row in rows_of(found, ('original', ''))]):.1f}"
    error = lambda key: f"{100 * np.mean([row['error']['forget'] for row in rows_of(found, key)]):.1f}"
    ours = rows_of(found, OURS)
    least = min(utility_kept(found, row) for row in ours)
    under = f"under {sum(keeps_utility(found, row) for row in ours)} of {len(ours)} seeds"
    kept = "keeps it" if OURS in keeping else f"keeps it {under} (the least it keeps: {100 * least:.1f} %)"
    beside = "" if best == OURS else f"; EUPMU, which {kept}, has {mean(OURS):.1f}"
    off = lambda key: np.mean([distance(found, row) for row in rows_of(found, key)])
    other = min((key for key in methods if key[0] != "EUPMU"), key=off)
    shares = [row["share_of_retraining"] for key in methods for row in rows_of(found, key)]
    our_share = np.mean([row["share_of_retraining"] for row in ours])
    return (
        f"Of {len(methods)} methods, {len(keeping)} keep utility within 1 % of the original model's under every seed. "
        f"Of these the best forget quality, {mean(best):.1f}, is that of {name_of(best)}{beside} (the original model: "
        f"{mean(('original', '')):.1f}). EUPMU ends at an error of {error(OURS)} % on forgotten persons. The original "
        f"model's error on persons who were never shown is {level} %, and the retrained model's on forgotten persons "
        f"{error(('retrained', ''))} %. EUPMU's five figures on forgotten persons are {off(OURS):.1f} points from the "
        f"retrained model's on average; those of the nearest method other than EUPMU, {name_of(other)}, are "
        f"{off(other):.1f}. With so few questions, EUPMU took {our_share:.0f} % of the time of fine-tuning again, and "
        f"all runs {min(shares):.0f} to {max(shares):.0f} %."
    )


def _why(found):
    """Why another method has the best forget quality, if one does, and what both criteria are worth."""
    original, retrained = (rows_of(found, (name, "")) for name in ("original", "retrained"))
    mean = lambda rows, get: np.mean([get(row) for row in rows])
    missed = lambda rows: mean(rows, lambda row: 100 * row["error"]["forget"])
    ratio = lambda rows: f"{mean(rows, lambda row: np.median(row['truth_ratios'])):.2f}"
    best = min(_methods(found), key=lambda key: _order(found, key))
    ours, level = rows_of(found, OURS), mean(original, lambda row: 100 * row["held_out_error"])
    count = min(len(row["truth_ratios"]) for row in found)
    p_value = lambda places: forget_quality(range(count), range(places, count + places)).p_value
    # From far to near: SciPy has no exact p-value of samples that are one place apart.
    apart = 1 + next(places for places in range(count, 0, -1) if p_value(places) >= 0.05)
    lost = sum(not keeps_utility(found, row) for row in retrained)
    line = (
        " The line of 1 % is finer than the differences between models that never saw the persons: the retrained model "
        f"itself misses it under {lost} of {len(retrained)} seeds."
    )
    other = (
        f", and {ratio(rows_of(found, best))} after {name_of(best)}, which misses "
        f"{missed(rows_of(found, best)):.1f} % of the tokens: a model that is close in one figure need not be close in "
        "the other"
    )
    return (
        f"EUPMU ends {'beyond' if missed(ours) > level else 'short of'} the level that it steers to, at "
        f"{missed(ours):.1f} against {level:.1f} % of the tokens. Forget quality does not look at tokens but at truth "
        f"ratios. Their median is {ratio(original)} in the original model, {ratio(retrained)} in the retrained one, "
        f"{ratio(ours)} after EUPMU{'' if best == OURS else other}. The test has little power: with {count} questions, "
        f"p falls below 5 % once the two distributions are {apart} questions apart. {_passed(found)}"
        f"{line if lost else ''}"
    )


def _passed(found):
    """Which methods the test does not tell from retraining under any seed, and which of them is nearest to it."""
    passes = lambda key: all(quality_of(found, row) >= np.log10(0.05) for row in rows_of(found, key))
    passing = [key for key in _keys(found) if key[0] not in REFERENCES and passes(key)]
    off = {key: np.mean([distance(found, row) for row in rows_of(found, key)]) for key in passing}
    nearest = min(passing, key=lambda key: off[key])
    return (
        f"Of {len(_methods(found))} methods, {len(passing)} pass it, with p of at least 5 % under every seed: "
        f"{'; '.join(map(name_of, passing))}. "
        f"Of these {name_of(nearest)} is nearest to the retrained model ({off[nearest]:.1f} points off)."
    )


def _short(found):
    """The README's sentence."""
    mean = lambda key, get: np.mean([get(row) for row in rows_of(found, key)])
    missed = lambda key: f"{100 * mean(key, lambda row: row['error']['forget']):.0f} %"
    utility = lambda key: f"{mean(key, lambda row: row['utility']):.3f}"
    ours = rows_of(found, OURS)
    lost = sum(not keeps_utility(found, row) for row in ours)
    seeds = "" if len(ours) == 1 else f"; means of {len(ours)} seeds, in {lost} of which it lost over {100 * KEPT:g} %"
    older = parts.of_version(ours, METHODS["EUPMU"].version)
    return (
        f"After untuned EUPMU{older}, SmolLM2-135M gets {missed(OURS)} of the tokens of answers about forgotten "
        f"persons wrong (before: {missed(('original', ''))}, retrained: {missed(('retrained', ''))}); its utility is "
        f"{utility(OURS)} (before: {utility(('original', ''))}{seeds})."
    )


def _answers(found):
    """A table of the answers of some models to each kind of question, under the first seed."""
    first = min(row["seed"] for row in found)
    shown = [rows.select(found, model=model, seed=first)[0] for model in SHOWN]
    count = len(shown[0]["answers"]) // len(KINDS)
    lines = [
        [kind, *(row["answers"][i * count + k] for row in shown)] for i, kind in enumerate(KINDS) for k in range(count)
    ]
    head = [["about", *SHOWN], ["---"] * (1 + len(SHOWN))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])
