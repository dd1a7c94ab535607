"""What a sceptic asks of unlearned parameters: can the forgotten be told from data never seen, and what was lost?"""

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.service import deletion, user_file
from eupmu_jax.tasks import Examples, Task, as_examples
from eupmu_jax.training import checkpoints, levels, relearning

PASSED, FAILED, INCONCLUSIVE = "passed", "failed", "inconclusive"
# Of each set.
MOST = 2_000
BITS = (8, 4)
# Of the relearning curves.
STEPS, EVERY, BATCH = 40, 10, 64


class Attack(NamedTuple):
    """How well the loss of an example tells some from those that were never seen.

    Attributes:
      auc: The probability that one of them has a smaller loss than one never seen; 0.5 tells nothing.
      low, high: Its 95 % interval.
      examples: `(n, m)`.
    """

    auc: float
    low: float
    high: float
    examples: tuple[int, int]

    @property
    def tells(self) -> bool:
        """Whether they can be told from what was never seen, in either direction: a loss too large betrays them too."""
        return not self.low <= 0.5 <= self.high


def attack(losses: np.ndarray, unseen: np.ndarray) -> Attack:
    r"""The population attack: an example is called a member where its loss is small.

    .. math:: A = P(\ell < \ell') + \tfrac12 P(\ell = \ell')

    with the standard error of Hanley and McNeil (1982, "The meaning and use of the area under a ROC curve"), in which a
    pair more on each side keeps it from 0.

    Args:
      losses: `(n,)`, of the examples in question.
      unseen: `(m,)`, of examples that were never seen.

    >>> found = attack(np.arange(100.0), np.arange(100.0))
    >>> found.auc, found.tells
    (0.5, False)
    >>> attack(np.arange(100.0), np.arange(100.0) + 60).tells
    True
    """
    from scipy import stats

    n, m = len(losses), len(unseen)
    auc = float(stats.mannwhitneyu(unseen, losses).statistic) / (n * m)
    a = (auc * n * m + 1) / (n * m + 2)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + (n - 1) * (q1 - a**2) + (m - 1) * (q2 - a**2)) / (n * m)
    width = 1.96 * max(variance, 0.0) ** 0.5
    return Attack(auc, auc - width, auc + width, (n, m))


def rounded(params: chex.ArrayTree, bits: int) -> chex.ArrayTree:
    """Parameters as integers of so many bits hold them, each leaf in steps of its largest entry by 2^(bits-1) - 1.

    >>> rounded({"w": jnp.array([1.0, 0.4, -0.2])}, 2)["w"].tolist()
    [1.0, 0.0, -0.0]
    """

    def of_leaf(leaf):
        step = jnp.max(jnp.abs(leaf)) / (2 ** (bits - 1) - 1)
        return jnp.where(step > 0, jnp.round(leaf / jnp.where(step > 0, step, 1)) * step, leaf).astype(leaf.dtype)

    return jax.tree.map(of_leaf, params)


def run(path: Path, out: Path) -> dict:
    """Writes `audit.json` in the folder of a finished run, see `make`; returns it."""
    deletion.write(out / "audit.json", make(path, out))
    return deletion.read(out / "audit.json")


def make(path: Path, out: Path) -> dict:
    """Audits a finished run of `deletion.run`.

    Args:
      path: Of the user's file. It is named by the user each time: nothing that a run's folder says is executed. With
        `retrained`, parameters of a model that never saw the forgotten examples, these are audited beside.
      out: Folder of the run.

    Returns:
      `verdict` and `reasons`; for each model `attacks` of the forgotten and of the retained examples, `errors`, and
      `relearning` on half of the forgotten and on retained examples; `rounding` of the unlearned parameters; `classes`
      with the retain error of each; `earlier`: what earlier runs forgot, under the parameters of this one.

    Raises:
      ValueError: For a folder without a finished run, one of other data or another model than the file has, or
        damaged parameters.
    """
    own = user_file.load(path, deletion.NEEDED)
    asked, reached = (deletion.read(out / f"{name}.json") for name in ("asked", "reached"))
    data, task = as_examples("data", own["data"]), own["task"]
    start = deletion.start_of(out, own["params"], asked["data"])
    if asked["data"] != user_file.data_digest(data) or asked["params"] != deletion.digest(start):
        raise ValueError(
            f"file: {path} has other data or parameters than the run in {out}, expected those it was made of"
        )
    found = checkpoints.load(out / "params", own["params"], {"asked": asked})
    if found is None:
        raise ValueError(f"out: {out / 'params'} has parameters of another run, expected those of {out / 'asked.json'}")
    ids = np.array(asked["positions"])
    forget, retain = deletion.parts(data, ids, deletion.positions_of(asked["earlier"]))
    unseen = None if own.get("held_out") is None else as_examples("held_out", own["held_out"])
    models = {"original": start, "unlearned": found[0]}
    if own.get("retrained") is not None:
        models["retrained"] = own["retrained"]
    sides = {"forgotten": forget, "retained": retain}
    audited: dict[str, Any] = {name: _of_model(task, params, sides, unseen) for name, params in models.items()}
    audited["rounding"] = {str(bits): _errors(task, rounded(found[0], bits), sides) for bits in BITS}
    audited["classes"] = _of_classes(task, models, retain)
    gone = [deletion.part(data, np.array(run["positions"])) for run in asked["earlier"]]
    audited["earlier"] = [_of_model(task, found[0], {"forgotten": part}, unseen) for part in gone]
    verdict, reasons = _verdict(audited, reached["level"], unseen is not None)
    for number, (again, run) in enumerate(zip(audited["earlier"], asked["earlier"], strict=True), 1):
        if again["errors"]["forgotten"]["high"] < run["target"]:
            verdict, reasons = FAILED, [*reasons, f"What run {number} of those before forgot is known again."]
    return {"verdict": verdict, "reasons": reasons} | audited | {"params": reached["params"]}


def _of_model(task, params, sides, unseen):
    losses = lambda part: levels.figures_of(task, params, part, MOST)[1]
    found = {"errors": _errors(task, params, sides)}
    if unseen is not None:
        reference = losses(unseen)
        found["attacks"] = {name: attack(losses(part), reference)._asdict() for name, part in sides.items()}
        found["errors"]["unseen"] = levels.measured_level(task, params, unseen, MOST)._asdict()
    if "retained" in sides and task.error is not None and isinstance(sides["retained"], Examples):
        found["relearning"] = _relearning(task, params, sides["forgotten"], sides["retained"])
    return found


def _errors(task: Task, params, sides):
    return {name: levels.measured_level(task, params, part, MOST)._asdict() for name, part in sides.items()}


def _relearning(task, params, forget, retain):
    half = max(1, len(forget) // 2)
    watched = Examples(forget.tree, forget.ids[half:] if len(forget) > 1 else forget.ids)
    curves = {}
    for name, train in (("on half of them", Examples(forget.tree, forget.ids[:half])), ("on retained", retain)):
        curve = relearning.relearn(task, params, train, watched, steps=STEPS, every=EVERY, batch_size=BATCH)
        curves[name] = {"step": curve.step.tolist(), "accuracy": curve.accuracy.tolist()}
    return curves


def _of_classes(task, models, retain):
    """The retain error of each class under each model, where the examples have labels."""
    labels = retain.tree.get("labels") if isinstance(retain, Examples) and isinstance(retain.tree, dict) else None
    if task.num_classes is None or labels is None or np.ndim(labels) != 1:
        return None
    of_each = np.asarray(labels)[retain.ids]
    found = {name: levels.unseen_levels(task, params, retain, of_each) for name, params in models.items()}
    return {name: {str(c): level.error for c, level in errors.items()} for name, errors in found.items()}


def _verdict(audited, level, has_unseen):
    """The verdict, and the reasons for it in words."""
    unlearned, retrained = audited["unlearned"], audited.get("retrained")
    if not has_unseen and retrained is None:
        return INCONCLUSIVE, ["There is neither held-out data nor a retrained model to compare with."]
    reasons = []
    if not level["kept"]:
        reasons.append("The retain error is above its limit.")
    if has_unseen and level["target"] < 1:
        found = Attack(**unlearned["attacks"]["forgotten"])
        # What a model that never saw them cannot hide either is no trace.
        if found.tells and not (retrained and _overlap(found, Attack(**retrained["attacks"]["forgotten"]))):
            reasons.append(
                f"An attack by the loss tells the forgotten from data never seen: AUC {found.auc:.2f} "
                f"({found.low:.2f} to {found.high:.2f})."
            )
    reference = retrained or {"errors": {"forgotten": {"low": level["target"], "high": level["target"]}}}
    error, wanted = unlearned["errors"]["forgotten"], reference["errors"]["forgotten"]
    if error["high"] < wanted["low"]:
        reasons.append(
            f"The forgotten are still known: an error of {error['error']:.3f}, expected {wanted['low']:.3f}."
        )
    for bits, errors in audited["rounding"].items():
        if errors["forgotten"]["high"] < min(error["low"], wanted["low"]):
            reasons.append(f"Rounding to {bits} bits brings the forgotten back.")
    return (FAILED, reasons) if reasons else (PASSED, [])


def _overlap(one, other):
    return one.low <= other.high and other.low <= one.high


def said(audited: dict) -> str:
    """The audit in a few lines."""
    percent = lambda level: f"{100 * level['error']:.1f}"
    lines = []
    for name in ("original", "unlearned", "retrained"):
        if name in audited:
            errors, attacks = audited[name]["errors"], audited[name].get("attacks", {})
            shown = ", ".join(f"{side} {percent(level)} %" for side, level in errors.items())
            told = ", ".join(f"{side} {found['auc']:.2f}" for side, found in attacks.items())
            lines.append(f"{name}: error on {shown}" + (f"; AUC of the attack on {told}" if told else ""))
    return "\n".join([*lines, *audited["reasons"], f"Verdict: {audited['verdict']}."])
