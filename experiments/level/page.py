"""The page about the level: the gains that were searched, and where untuned runs end, from `rows.jsonl`."""

from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from eupmu_jax import metrics
from eupmu_jax.benchmark import rows
from experiments import parts
from experiments.level.run import (
    AGAIN,
    CHOSEN_VERSION,
    FRESH,
    NAMES,
    SEARCHED,
    STEPS,
    VERSION,
    by_score,
    reaches,
    shown,
    split,
    tells,
)

ROWS = Path(__file__).with_name("rows.jsonl")


def blocks() -> dict[str, str]:
    """The gains by score, and the share of runs that end at their target."""
    found = rows.read(ROWS)
    robust = rows.select(found, kind="robustness", method_version=VERSION)
    return {
        "gains": gains(rows.select(found, kind="search")),
        "level by forget set": by_case(robust),
        "level by rate": ends(robust, "learning rate", lambda row: row["settings"]["learning_rate"]),
        "level by batch": ends(robust, "forget batch", lambda row: row["batch"]),
        "level by steps": by_steps(rows.select(found, kind="steps", method_version=VERSION)),
        "level in short": in_short(robust),
    }


def gains(found: list[dict]) -> str:
    """A table of the gains with the best scores when they were chosen, and of those with the worst, then and now."""
    of = lambda version, seeds: [row for row in found if row["method_version"] == version and row["seed"] in seeds]
    then, now = by_score(of(CHOSEN_VERSION, SEARCHED)), by_score(of(VERSION, SEARCHED))
    again = by_score(of(VERSION, AGAIN))
    lines, inside = [], 0
    for key in shown(found):
        scores = [row["blind"] for row in now[key]]
        mean, low, high = metrics.paired_interval(scores, np.zeros(len(scores)))
        repeated = _mean(again[key], "blind")
        inside += low <= repeated <= high
        lines.append(
            [
                *(f"{gain:g}" for gain in key),
                f"{_mean(then[key], 'blind'):.2f}",
                f"{_reached(then[key]):.0f}",
                f"{mean:.2f}",
                f"{low:.2f} to {high:.2f}",
                str(1 + list(now).index(key)),
                f"{repeated:.2f}",
                "yes" if low <= repeated <= high else "no",
            ]
        )
    head = [*NAMES, "score", "at the target, %", "score now", "95 %", f"place of {len(now)}", "again", "inside"]
    return parts.table(head, lines) + f"\n{inside} of {len(lines)} scores on the new seeds lie inside the interval.\n"


def ends(found: list[dict], head: str, key) -> str:
    """The share of runs at their target by one dimension and by the number of steps, and their cost in accuracy."""
    steps = sorted({row["steps"] for row in found})
    lines = []
    for value in sorted({key(row) for row in found}):
        mine = [row for row in found if key(row) == value]
        shares = [f"{_reached(rows.select(mine, steps=count)):.0f}" for count in steps]
        rises = [100 * (row["retain_error"] - row["retain_error_before"]) for row in mine]
        falls = [100 * (row["test_error"] - row["test_error_before"]) for row in mine]
        lines.append([f"{value:g}", *shares, f"{np.mean(rises):.2f}", f"{np.mean(falls):.2f}"])
    return parts.table([head, *(f"{count:,} steps, %" for count in steps), "retain, points", "test, points"], lines)


def by_steps(found: list[dict]) -> str:
    """The gap to the retrained model by learning rate, with steps up to the learning rate and with longer ones."""
    lines = []
    kinds = list(dict.fromkeys((row["forget"], row["longest"]) for row in found))
    for rate in sorted({row["learning_rate"] for row in found}):
        mine = [rows.select(found, learning_rate=rate, forget=forget, longest=longest) for forget, longest in kinds]
        lines.append([f"{rate:g}", *(f"{_mean(part, 'gap'):.2f}" for part in mine)])
    names = {"random:10%": "10 % at random", "class:{}": "a class"}
    head = [f"{names[forget]}, up to {longest:g}" for forget, longest in kinds]
    return parts.table(["learning rate", *head], lines)


def by_case(found: list[dict]) -> str:
    """For each forget set, the share of runs at their target, and of original models that pass the same test."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in found):
        mine = rows.select(found, case=case)
        passes = f"{100 * np.mean([not tells(row) for row in mine]):.0f}"
        p_values = [row["apart"][3] for row in mine if row["apart"] is not None]
        by_loss = f"{100 * np.mean(np.array(p_values) < 0.05):.0f}" if p_values else "-"
        by_steps = [f"{_reached(rows.select(mine, steps=count)):.0f}" for count in STEPS]
        new = f"{_reached([row for row in mine if row['seed'] in FRESH]):.0f}"
        within = f"{100 * np.mean([_is_within(row) for row in mine]):.0f}" if p_values else "-"
        lines.append([case, str(len(mine)), f"{_reached(mine):.0f}", new, *by_steps, within, passes, by_loss])
    counts = [f"in {count:,} steps, %" for count in STEPS]
    head = ["forget set", "runs", "at the target, %", "on new seeds, %", *counts, "within its interval, %"]
    head += ["original passes, %", "told apart by losses, %"]
    return parts.table(head, lines)


def in_short(found: list[dict]) -> str:
    """The paragraph in the README: the forget sets apart, as they end differently and cost differently."""
    telling = [row for row in found if tells(row)]
    half, by_class = (rows.select(telling, case=case) for case in ("random:50%", "class"))
    seeds = len({row["seed"] for row in telling})
    gain = lambda mine, part: np.mean([100 * (row[f"{part}_error_before"] - row[f"{part}_error"]) for row in mine])
    alike = 100 * np.mean([row["apart"][3] >= 0.05 for row in half])

    def span(get):
        return f"{min(map(get, telling)):,} to {max(map(get, telling)):,}"

    return parts.paragraph(
        f"Untuned, on digits ({seeds} seeds, learning rates {span(lambda row: row['settings']['learning_rate'])}, "
        f"forget batches {span(lambda row: row['batch'])}, {span(lambda row: row['steps'])} steps): of {len(half)} "
        f"runs that forgot half of the data, {_reached(half):.0f} % ended with no significant difference in error "
        f"between forgotten and unseen digits (in loss: {alike:.0f} %); of {len(by_class)} that forgot a class, "
        f"{_reached(by_class):.0f} % recognise at most 2 % of it. Points gained: retain accuracy "
        f"{gain(telling, 'retain'):z.2f}, test {gain(half, 'test'):+.1f} (class: {gain(by_class, 'test'):+.1f})."
    )


def _mean(found, name):
    return float(np.mean([row[name] for row in found]))


def _is_within(row):
    """Whether the forget error lies in the 95 % interval of the target, which is a rate among unseen digits."""
    count = len(split(row["case"], row["seed"])["held_out"])
    low, high = binomtest(round(row["target"] * count), count).proportion_ci(method="wilson")
    return low <= row["forget_error"] <= high


def _reached(found):
    return 100 * float(np.mean([reaches(row) for row in found]))
