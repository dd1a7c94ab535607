"""Audits unlearned parameters: can forgotten examples be told apart from unseen data, and what was lost?"""

from pathlib import Path
from typing import Any

import numpy as np

from eupmu_jax import metrics
from eupmu_jax.service import _judged, _verdict, _words, deletion, folder, records, retraining, user_file
from eupmu_jax.service._again import untrue
from eupmu_jax.service._measured import Shadows, beside, errors_of, of_classes, of_model
from eupmu_jax.service._verdict import FAILED, INCONCLUSIVE, PASSED
from eupmu_jax.tasks import as_examples
from eupmu_jax.tasks.examples import part_of
from eupmu_jax.training import checkpoints
from eupmu_jax.training._digest import digest
from eupmu_jax.training._overlap import shared
from eupmu_jax.training.classes import classes_to_go, labels_of

# Largest fraction of held-out examples that may also be in the data; beyond it, comparisons with them mean nothing.
OVERLAP = 0.1
BITS = (8, 4)
APART = "Matrices were rounded one by one: adapters that are merged into their base first may round differently."
CHANGED = "The user's file has changed since the run: these are the figures of its task as it is now."
UNTOLD = "The original model passes the same tests: the forgotten examples are too few or were barely learned."


def run(path: Path, out: Path) -> dict:
    """Writes `audit.json` to the folder of a finished run, and returns it; see `make`."""
    records.write(out / "audit.json", make(path, out))
    return records.read(out / "audit.json", "audit")


def make(path: Path, out: Path) -> dict:
    """Audits a finished run of `deletion.run`.

    Args:
      path: Path of the user's file. The user names it each time: nothing that a run's folder says is executed. If it
        defines `shadows`, pairs of parameters and the positions they were trained on, a per-example attack is added to
        the population attack. If it defines `groups`, one for each example of the data, errors are given by group
        instead of by class.
      out: Folder of the run. If it has retrained parameters (`retraining.retrain`), these are audited too.

    Returns:
      A dict with

      - `verdict` and `reasons`;
      - `remarks`, such as that the original model passes too (in that case, if the error is not above what it was,
        nothing is decided);
      - for each model: `attacks` on the forgotten and on the retained examples, `canaries`, `lira` if there are shadow
        models and `beside` if there is a retrained one, all against held-out examples with the same mix of classes;
        `errors`; and `relearning` on half of the forgotten and on retained examples, of what is not frozen;
      - `rounding` of the unlearned parameters;
      - `classes`, the retain error of each class or group;
      - `earlier`, what earlier runs forgot, under the parameters of this one;
      - `overlap`, how many held-out examples are also in the data.

      Classes to be forgotten have a separate attack, against held-out examples of these classes. The results that the
      run recorded are measured again, and a record that disagrees fails the audit.

    A model that never saw the forgotten examples fails each of these tests by chance in up to 5 % of cases: the
    comparison of errors with the aim, all attacks on the forgotten together, and all attacks on what earlier runs
    forgot. Relearning does not affect the verdict. Held-out data define the aim of the run, and the forgotten examples
    are compared with them as if both were drawn from the same distribution. Data of one person or source may differ for
    that reason alone; a retrained model or shadow models reveal this.

    Raises:
      ValueError: For a folder without a finished run; for a run on other data, held-out data or original parameters
        than those of the file; for parameters that are damaged or not those that the run ended with; or for malformed
        shadow models.
    """
    own = user_file.load(path, deletion.NEEDED)
    asked, reached = (records.read(out / f"{name}.json", name) for name in ("asked", "reached"))
    data, task = as_examples("data", own["data"]), own["task"]
    start = folder.start_of(out, own["params"], asked["data"])
    if asked["data"] != user_file.data_digest(data) or asked["params"] != digest(start):
        raise ValueError(
            f"file: {path} has other data or parameters than the run in {out}, expected those that it used"
        )
    found = checkpoints.load(out / "params", own["params"], {"asked": asked})
    if found is None:
        raise ValueError(f"out: {out / 'params'} has parameters of another run, expected those of {out / 'asked.json'}")
    if digest(found[0]) != reached["params"]:
        raise ValueError(f"out: {out / 'params'} has other parameters than the run ended with, expected those")
    held_out = None if own.get("held_out") is None else user_file.data_digest(own["held_out"], "held_out")
    if None not in (held_out, asked["held_out"]) and held_out != asked["held_out"]:
        raise ValueError(
            f"held_out: {path} has other examples than the run in {out} took its target from, expected those"
        )
    ids = np.array(asked["positions"])
    forget, retain = deletion.parts(data, ids, folder.positions_of(asked["earlier"]))
    unseen = _judged.held_out_of(own)
    models = {"original": start, "unlearned": found[0]}
    if (retrained := retraining.retrained_of(out, own["params"], asked)) is not None:
        models["retrained"] = retrained
    sides, gone = {"forgotten": forget, "retained": retain}, classes_to_go(task, data, retain)
    shadows = Shadows(task, own.get("shadows"), start, data, ids, unseen, gone)
    audited: dict[str, Any] = {}
    for name, params in models.items():
        audited[name] = of_model(task, params, sides, unseen, gone, own.get("frozen")) | shadows.figures(task, params)
    is_other = retrained is not None and digest(retrained) != asked["params"]
    for name in ("original", "unlearned") if is_other else ():
        audited[name] |= beside(task, models[name], retrained, forget, unseen, gone)
    audited["rounding"] = {str(bits): errors_of(task, metrics.rounded(found[0], bits), sides) for bits in BITS}
    audited["classes"] = of_classes(task, models, retain, user_file.groups_of(own, data, folder.forgotten_by(out)))
    before = [part_of(data, np.array(run["positions"])) for run in asked["earlier"]]
    audited["earlier"] = [of_model(task, found[0], {"forgotten": part}, unseen, gone) for part in before]
    audited["rates"] = task.is_rate
    overlap = audited["overlap"] = 0 if unseen is None else sum(shared(unseen, part) for part in (forget, retain))
    verdict, reasons = _verdict.verdict(audited, reached, unseen is not None)
    if verdict == PASSED and unseen is not None and overlap > OVERLAP * len(unseen):
        known = f"{overlap:,} of {len(unseen):,} held-out examples are in the data, or equal some in it"
        verdict, reasons = INCONCLUSIVE, [f"{known}: they are not unseen."]
    passes_too = _verdict.original_passes(audited, reached["level"], unseen is not None)
    before, after = (audited[name]["errors"]["forgotten"]["error"] for name in ("original", "unlearned"))
    if verdict == PASSED and passes_too and after <= before:
        verdict, reasons = INCONCLUSIVE, ["Too few examples to decide: their error is no higher than before."]
    wrong = untrue(own, asked, reached, start, found[0], (forget, retain))
    more = [f"reached.json does not match the parameters: {'; '.join(wrong)}."] if wrong else []
    if more := more + _verdict.above(audited, reached["level"]) + _verdict.known_again(audited, asked["earlier"]):
        verdict, reasons = FAILED, [*(reasons if verdict == FAILED else []), *more]
    remarks = [UNTOLD] if passes_too else []
    if retrained is not None and not is_other:
        remarks.append("The retrained model is the original one, so it shows nothing.")
    remarks += _verdict.remarks(audited, unseen is not None, _staying(task, forget, gone))
    remarks += [APART] if own.get("frozen") is not None else []
    remarks += [CHANGED] if folder.is_of_other_code(path, reached) else []
    return {"verdict": verdict, "reasons": reasons, "remarks": remarks} | audited | {"params": reached["params"]}


def _staying(task, forget, gone):
    """How many forgotten examples are not of a class to be forgotten."""
    labels = labels_of(task, forget)
    return len(forget) if labels is None else int(np.sum(~np.isin(labels, list(gone))))


def said(audited: dict) -> str:
    """The audit in a few lines."""
    percent = lambda level: _words.shown(level["error"], audited["rates"])
    lines = []
    for name in ("original", "unlearned", "retrained"):
        if name in audited:
            errors, found = audited[name]["errors"], audited[name].get("attacks", {})
            shown = ", ".join(f"{side} {percent(level)}" for side, level in errors.items())
            told = ", ".join(f"{side} {of_side['auc']:.2f}" for side, of_side in found.items())
            for kind, words in (("lira", "with shadow models"), ("beside", "with the retrained model")):
                told += f", {words} {audited[name][kind]['auc']:.2f}" if kind in audited[name] else ""
            lines.append(f"{name}: error on {shown}" + (f"; AUC of the attack on {told}" if told else ""))
    return "\n".join([*lines, *audited["reasons"], *audited["remarks"], f"Verdict: {audited['verdict']}."])
