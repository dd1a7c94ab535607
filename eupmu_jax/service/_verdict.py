"""Turns the figures of an audit into words: its verdict, the reasons for it, and what weakens it."""

import numpy as np

from eupmu_jax.service import _judged, _words
from eupmu_jax.service._measured import GONE
from eupmu_jax.service.attacks import Attack
from eupmu_jax.training import levels

PASSED, FAILED, INCONCLUSIVE = "passed", "failed", "inconclusive"
# Fraction of the forgotten examples; if fewer could be compared with unseen ones, a remark says so.
COMPARED = 0.8
BY_LOSS = "An attack by the loss distinguishes forgotten from unseen examples"
OF_GOING = f"{BY_LOSS} of the classes to be forgotten"


def verdict(audited, reached, has_unseen):
    """The verdict, and the reasons for it in words."""
    level, retrained = reached["level"], audited.get("retrained")
    reasons = [] if level["kept"] else ["The retain error is above its limit."]
    if not has_unseen and retrained is None:
        nothing = "There is neither held-out data nor a retrained model to compare with."
        return FAILED if reasons else INCONCLUSIVE, [*reasons, nothing]
    least, most = bounds(retrained, level, audited["rates"])
    reasons += traces(audited, "unlearned", least, has_unseen)
    error, shown = audited["unlearned"]["errors"]["forgotten"], lambda value: _words.shown(value, audited["rates"])
    if error["low"] > most:
        much = f"an error of {shown(error['error'])}, where the retrained model has at most {shown(most)}"
        reasons.append(f"Too much was forgotten: {much}.")
    if not reasons and retrained is None and not reached["met"]:
        reasons.append("The run missed its target.")
    for bits, errors in audited["rounding"].items():
        if errors["forgotten"]["high"] < min(error["low"], least):
            reasons.append(f"Rounding to {bits} bits brings the forgotten examples back.")
    return (FAILED, reasons) if reasons else (PASSED, [])


def above(audited, level):
    """Reports a retain error above its limit, if the audit finds it and the run says otherwise."""
    found, limit = audited["unlearned"]["errors"]["retained"], level["limit"]
    passed = None not in (found["low"], limit) and found["low"] > limit
    return ["The retain error is above its limit."] if level["kept"] and passed else []


def known_again(audited, earlier):
    """Says what earlier runs forgot and these parameters reveal; the attacks together keep the false alarm rate."""
    said = []
    for number, (again, run) in enumerate(zip(audited["earlier"], earlier, strict=True), 1):
        attack = again.get("attacks", {}).get("forgotten")
        least = _judged.least_of(run["target"], None if audited["rates"] else 0.0, run.get("interval"))
        if again["errors"]["forgotten"]["high"] < least:
            said.append(f"What earlier run {number} forgot is known again.")
        elif attack and Attack(**attack).tells_among(len(earlier)):
            said.append(
                f"What earlier run {number} forgot can be distinguished from unseen data: AUC {_words.auc(attack)}."
            )
    return said


def original_passes(audited, level, has_unseen):
    """Whether the tests find no trace in the original model either."""
    retrained = audited.get("retrained")
    least, _ = bounds(retrained, level, audited["rates"])
    return bool(has_unseen or retrained) and not traces(audited, "original", least, has_unseen)


def remarks(audited, has_unseen, staying):
    """Says what else weakens a verdict."""
    found = []
    attacked = audited["unlearned"].get("attacks", {}).get("forgotten")
    compared = attacked["examples"][0] if attacked else 0
    if has_unseen and compared < COMPARED * min(staying, levels.MOST):
        found.append(
            f"Only {compared:,} of {staying:,} forgotten examples are compared: there are too few unseen examples of "
            "the others' classes."
        )
    going = audited["unlearned"].get("attacks", {}).get(GONE)
    if going and Attack(**going).tells and "retrained" not in audited:
        found.append(f"{OF_GOING}: AUC {_words.auc(going)}.")
    if audited.get("overlap"):
        found.append(f"{audited['overlap']:,} held-out examples are in the data, or equal some in it.")
    if "relearning" not in audited["unlearned"]:
        found.append("Relearning was not tried: it needs data in arrays and a task with an error.")
    return found


def bounds(retrained, level, rates):
    """The least and the greatest error that the forgotten examples should have; 0 and infinity if unknown."""
    if retrained:
        return retrained["errors"]["forgotten"]["low"], retrained["errors"]["forgotten"]["high"]
    # A class to be forgotten cannot be compared with unseen data, and its target was not measured.
    interval = level.get("interval") if level["comparison"] else None
    return _judged.least_of(level["target"], None if rates else 0.0, interval), np.inf


def traces(audited, name, least, has_unseen):
    """Says what shows that a model knows the forgotten examples; for classes to be forgotten, only their error."""
    model, retrained, found = audited[name], audited.get("retrained"), []
    if has_unseen:
        kinds = {
            BY_LOSS: lambda one: one["attacks"].get("forgotten"),
            "An attack with shadow models distinguishes forgotten from unseen examples": lambda one: one.get("lira"),
            "An attack with the retrained model distinguishes forgotten from unseen examples": lambda one: one.get(
                "beside"
            ),
        }
        if retrained:
            # Only a retrained model shows how a class that it never saw looks.
            kinds[OF_GOING] = lambda one: one["attacks"].get(GONE)
        made = sum(of_model(model) is not None for of_model in kinds.values())
        for kind, of_model in kinds.items():
            attacks = [attack for one in (model, retrained) if one and (attack := of_model(one))]
            # An attack that succeeds equally on a retrained model shows no trace.
            tells = attacks and Attack(**attacks[0]).tells_among(made)
            if tells and not (len(attacks) == 2 and _alike(*(Attack(**attack) for attack in attacks))):
                found.append(f"{kind}: AUC {_words.auc(attacks[0])}.")
    error, shown = model["errors"]["forgotten"], lambda value: _words.shown(value, audited["rates"])
    if error["high"] < least:
        found.append(
            f"The forgotten examples are still known: an error of {shown(error['error'])}, expected {shown(least)}."
        )
    return found


def _alike(one, other):
    """Whether both attacks succeed, in the same direction, and equally well within their intervals."""
    same = other.tells and (one.auc > 0.5) == (other.auc > 0.5)
    return same and one.low <= other.high and other.low <= one.high
