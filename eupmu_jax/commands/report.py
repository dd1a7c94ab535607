"""`eupmu report`: one page on what was asked, what was done, and what the audit found."""

import html
from collections.abc import Callable
from pathlib import Path

from eupmu_jax.commands import document, picture
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.service import _words, report
from eupmu_jax.service._measured import GONE
from eupmu_jax.service.audit import UNTOLD

COLORS = {"EUPMU": "#0b6e4f"}
SIDES, MODELS = ("forgotten", "retained", "unseen"), ("original", "unlearned", "retrained")
VERDICTS = {
    "passed": "The tests below found no trace of the forgotten examples, and the retain error is within its limit.",
    "failed": "At least one check of the audit failed.",
    "inconclusive": "The audit could not decide.",
}
ORIGINAL_PASSES_TOO = (
    "The tests below found no trace of the forgotten examples, but they find none in the original model either. The "
    "retain error is within its limit."
)
AIMED = "Held-out examples set the target of the run."
COMPARED = (
    "The forgotten examples are compared with held-out ones as if both came from one distribution. Data of one person "
    "or source may differ for that reason alone, which a retrained model or shadow models can show. One in twenty "
    "models that never saw the forgotten examples fails each comparison by chance."
)


def run(out: Path) -> Path:
    """Writes `report.json` and `report.html` in the folder of an audited run; returns the path of the page."""
    made = report.make(out)
    document.write(out / "report.html", render(made))
    return out / "report.html"


def render(made: dict) -> str:
    """The page of a report."""
    asked, reached, audited = made["asked"], made["reached"], made["audit"]
    level, examples = reached["level"], reached["examples"]
    shown = lambda value: _words.shown(value, reached["rates"])
    reached_both = f"target reached{_words.given_noise(reached)} and limit kept"
    together = reached_both if reached["met"] else "not both: see the run below"
    reasons = "".join(f"<li>{html.escape(line)}</li>" for line in [*audited["reasons"], *audited["remarks"]])
    is_untold = audited["verdict"] == "passed" and UNTOLD in audited["remarks"]
    headline = ORIGINAL_PASSES_TOO if is_untold else VERDICTS[audited["verdict"]]
    body = f"""<h1>Unlearning: {html.escape(audited["verdict"])}</h1>
<p class="sub">{examples["forget"]:,} of {sum(examples.values()):,} examples, seed {asked["seed"]}</p>
<p class="headline">{headline}</p><ul>{reasons}</ul>
<h2>What was asked and reached</h2>
<dl class="facts">
<dt>forget error</dt><dd>{shown(level["forget_error"])}; {html.escape(_words.aim(reached))}</dd>
<dt>retain error</dt><dd>{shown(level["retain_error"])}; it was {shown(level["start"])}, the limit is
{shown(level["limit"])}</dd>
<dt>together</dt><dd>{together}</dd>
<dt>passes</dt><dd>{reached["passes"]["forward"]:,} forward, {reached["passes"]["backward"]:,} backward</dd>
</dl>
<h2>The run</h2>
<div class="figure">{_picture(reached)}</div>
<h2>What the audit found</h2>
<div class="wide wrap">{_models(audited)}</div>
<p class="sub">Errors with their 95 % intervals, on at most 2,000 examples of each set. {_lines(audited)} The second
table shows the unlearned parameters after rounding.</p>
<div class="wide">{_rounding(audited)}</div>
{_classes(audited)}
{_earlier(asked, audited)}
<h2>What this page does not show</h2>
<p>The attacks use losses alone, and there is one seed. A stronger attack may find more, and so may somebody who
fine-tunes the model{_relearning(audited)}. Finding no trace does not prove that there is none.
{AIMED if level["comparison"] else ""} {COMPARED if _is_compared(audited) else ""}</p>
<p>Only the parameters in <code>params</code> were audited. The original ones, and the checkpoints in <code>start</code>
and <code>steps</code> of this folder, may still know the forgotten examples. They stay until you delete them.</p>
<h2>How to check it</h2>
<p><code>eupmu verify report.json FILE.py</code> repeats the audit. It needs the original parameters and the data of the
run, the forgotten examples included: once they are deleted, the figures can no longer be checked.</p>
<dl class="facts">{_facts(made)}</dl>
<footer>{html.escape(reached["command"])} | {html.escape(_versions(reached))} |
{html.escape(str(reached["device"]))}</footer>
"""
    return document.document("eupmu report", body)


def _picture(reached):
    level = reached["level"]
    # As in the text: the history is measured in other batches, on which a task may draw other noise.
    ends = {"EUPMU": reached["figures"]["returned"] | {name: level[name] for name in ("forget_error", "retain_error")}}
    target = level["target"] if level["target"] < UNLIMITED else None
    shown = {
        "target": target,
        "interval": _words.measured_interval(reached),
        "limit": level["limit"],
        "rates": reached["rates"],
    }
    return picture.svg(picture.of_runs({"EUPMU": reached["history"]}, COLORS, ends=ends, **shown))


def _table(head, lines):
    cells = lambda kind, line: "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in line)
    body = "".join(f"<tr><th>{html.escape(line[0])}</th>{cells('td', line[1:])}</tr>" for line in lines)
    return f"<table><thead><tr><th></th>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _level(level, rates):
    if not level:
        return "-"
    error, low, high = (_words.number(level[name], rates) for name in ("error", "low", "high"))
    # A single error that is not a rate has no interval.
    return error if "-" in (low, high) else f"{error} ({low} to {high})"


def _models(audited):
    """A table with a column for each model; lines that are empty for all of them are left out."""
    shown, rates = {name: audited[name] for name in MODELS if name in audited}, audited["rates"]
    figures: dict[str, Callable] = {}
    for side in SIDES:
        head = f"error, {side}" + (", %" if rates else "")
        figures[head] = lambda found, side=side: _level(found["errors"].get(side), rates)
    for side in (*SIDES[:2], GONE):
        figures[f"AUC, {side}"] = lambda found, side=side: _auc(found.get("attacks", {}).get(side))
    figures |= {
        "AUC, shadow models": lambda found: _auc(found.get("lira")),
        "AUC, beside retrained": lambda found: _auc(found.get("beside")),
        "TPR at 1 % FPR, %": lambda found: _true_positives(found.get("canaries")),
        "epsilon at least": lambda found: "-" if not found.get("canaries") else f"{found['canaries']['epsilon']:.2f}",
        "relearned" + ", %" * rates: lambda found: _relearned(found, "on half of them", rates),
        "by retaining" + ", %" * rates: lambda found: _relearned(found, "on retained", rates),
    }
    cells = {head: [text(found) for found in shown.values()] for head, text in figures.items()}
    return _table(list(shown), [[head, *texts] for head, texts in cells.items() if set(texts) != {"-"}])


def _lines(audited):
    """What the lines of the table mean that not every audit has."""
    made = {name for model in MODELS for name, found in audited.get(model, {}).items() if found}
    gone = any(GONE in audited.get(model, {}).get("attacks", {}) for model in MODELS)
    learned = "accuracy" if audited["rates"] else "error"
    said = {
        "AUC: how often a loss is smaller than that of an unseen example, where the unseen ones have the same mix of "
        "classes; 0.5 is chance.": "attacks" in made,
        "Classes to go: the same on the classes to be forgotten alone.": gone,
        "Shadow models: the same, with each example judged by models that never saw it.": "lira" in made,
        "Beside retrained: the same, with each example judged by the retrained model.": "beside" in made,
        "TPR: the share of the forgotten examples that their loss identifies at a false positive rate of 1 % on unseen "
        "ones. Epsilon: a lower bound on that of differential privacy, as if the training examples had been drawn at "
        "random.": "canaries" in made,
        f"Relearned: {learned} on one half of the forgotten examples before and after {_steps(audited)} steps on the "
        "other half, or on the retain set alone.": "relearning" in made,
    }
    return " ".join(text for text, is_shown in said.items() if is_shown)


def _relearning(audited):
    return "; relearning is shown but does not affect the verdict" if audited["unlearned"].get("relearning") else ""


def _is_compared(audited):
    return "forgotten" in audited["unlearned"].get("attacks", {})


def _auc(attack):
    return _words.auc(attack) if attack else "-"


def _true_positives(canaries):
    if not canaries:
        return "-"
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * canaries[name] for name in ("true_positives", "low", "high")))


def _relearned(found, how, rates):
    curve = found.get("relearning", {}).get(how)
    # The curve holds accuracies; errors that are not rates are stored as 100 - 100 * error.
    figure = lambda accuracy: f"{accuracy:.0f}" if rates else f"{1 - accuracy / 100:.4g}"
    shown = lambda accuracy: "-" if accuracy is None else figure(accuracy)
    return "-" if not curve else f"{shown(curve['accuracy'][0])} to {shown(curve['accuracy'][-1])}"


def _steps(audited):
    curves = audited["unlearned"].get("relearning", {})
    return next((curve["step"][-1] for curve in curves.values()), 0)


def _rounding(audited):
    lines = [
        [f"{bits} bits", *(_level(errors[side], audited["rates"]) for side in SIDES[:2])]
        for bits, errors in audited["rounding"].items()
    ]
    return _table([f"error, {side}" + (", %" if audited["rates"] else "") for side in SIDES[:2]], lines)


def _classes(audited):
    if not audited["classes"]:
        return ""
    models = list(audited["classes"])
    of_each = sorted(audited["classes"]["original"], key=lambda name: name.zfill(9) if name.isdigit() else name)
    number = lambda model, name: _words.number(audited["classes"][model][name], audited["rates"])
    lines = [[name, *(number(model, name) for model in models)] for name in of_each]
    table, unit = _table(models, lines), ", %" if audited["rates"] else ""
    return f'<h2>Retain error of each class or group{unit}</h2>\n<div class="wide">{table}</div>'


def _earlier(asked, audited):
    if not asked["earlier"]:
        return ""
    lines = [
        [
            f"run {number}, {len(run['positions']):,} examples",
            _words.number(run["target"], audited["rates"]) if run["target"] < UNLIMITED else "no level",
            _level(found["errors"]["forgotten"], audited["rates"]),
            _auc(found.get("attacks", {}).get("forgotten")),
        ]
        for number, (run, found) in enumerate(zip(asked["earlier"], audited["earlier"], strict=True), 1)
    ]
    unit = ", %" if audited["rates"] else ""
    table = _table([f"aimed at{unit}", f"error now{unit}", "AUC"], lines)
    return f'<h2>What earlier runs forgot</h2>\n<div class="wide wrap">{table}</div>'


def _facts(made):
    asked, reached = made["asked"], made["reached"]
    digests = {name: asked[name] for name in ("data", "ids", "params", "held_out")}
    facts = [
        *((f"SHA-256, {name}", value or "none") for name, value in digests.items()),
        ("SHA-256, unlearned", reached["params"]),
        ("SHA-256, your file", reached["code"] or "none"),
        (
            "steps, batches",
            f"{asked['steps']} of {asked['forget_batch']} + {asked['retain_batch']}, seed {asked['seed']}",
        ),
    ]
    return "".join(f"<dt>{html.escape(n)}</dt><dd><code>{html.escape(str(v))}</code></dd>" for n, v in facts)


def _versions(reached):
    return ", ".join(f"{name} {number}" for name, number in reached["versions"].items())
