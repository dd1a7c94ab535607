"""The page of the journey: three requests, and what the audit found after each, from `rows.jsonl`."""

from pathlib import Path

from eupmu_jax.benchmark import rows
from experiments import parts

ROWS = Path(__file__).with_name("rows.jsonl")


def blocks() -> dict[str, str]:
    """What each run reached, and what the last audit found for every request."""
    found = rows.read(ROWS)
    return {"requests": requests(found), "all requests": again(found[-1], found)}


def requests(found: list[dict]) -> str:
    """A line for each run."""
    lines = []
    for row in found:
        level, attacks = row["level"], row["unlearned"]["attacks"]
        attack = attacks.get("forgotten", attacks.get("classes to go"))
        errors = (level["forget_error"], level["target"], level["start"], level["retain_error"])
        codes = ", ".join(map(str, row["codes"]))
        retrained = f"{100 * row['retrained']['errors']['forgotten']['error']:.1f}"
        beside = [_auc(row[model].get("beside")) for model in ("original", "unlearned")]
        shown = [
            *(f"{100 * error:.1f}" for error in errors[:2]),
            retrained,
            *(f"{100 * error:.1f}" for error in errors[2:]),
        ]
        lines.append([row["reason"], *shown, _auc(attack), *beside, row["verdict"], codes])
    head = [
        "forgotten",
        "error, %",
        "aimed at",
        "retrained",
        "retain error before",
        "after",
        "AUC",
        "AUC, original beside retrained",
    ]
    return parts.table([*head, "AUC beside retrained", "audit", "exit codes"], lines)


def _auc(attack):
    return "{auc:.2f} ({low:.2f} to {high:.2f})".format(**attack) if attack else "-"


def again(last: dict, found: list[dict]) -> str:
    """What the last audit found for every request."""
    lines = []
    for row, audited in zip(found, [*last["earlier"], last["unlearned"]], strict=True):
        level = audited["errors"]["forgotten"]
        interval = f"{100 * level['low']:.1f} to {100 * level['high']:.1f}"
        lines.append([row["reason"], f"{100 * row['level']['target']:.1f}", f"{100 * level['error']:.1f}", interval])
    return parts.table(["forgotten", "aimed at, %", "error after the last request", "95 % interval"], lines)
