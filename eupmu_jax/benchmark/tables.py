"""Tables of a benchmark from its rows, for the terminal, as Markdown or LaTeX; and the table of all methods."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from eupmu_jax.benchmark import designs, saved, summary, tuning
from eupmu_jax.methods import METHODS
from eupmu_jax.methods.method import OPTIMIZER_SETTINGS

HEAD = ("", "UA", "RA", "TA", "MIA", "gap", "95 %", "KL", "time, %", "passes, %", "trials")
REFERENCES = ("original", "retrained")
# On a terminal with fewer characters per line, some columns are left out.
WIDE = 110
NARROW_LACKS = ("95 %", "KL", "passes, %")
CHOSEN = {"blind": "chosen blindly", "gap": "chosen with the retrained model in view"}
LEGEND = (
    "Means over {seeds} seeds. UA: 100 - accuracy on the forget set; RA, TA: accuracy on the retain and the test set; "
    "MIA: share of the forget set that an attack on confidences classifies as unseen; gap: mean distance of the four "
    "to the model retrained with the same seed and split, with its bootstrap interval (* least gap, or tied with it by "
    "the interval of paired differences); KL: to the retrained model on the forget set, in nats; time: of the run, as "
    "a share of retraining; passes: forward and backward, likewise; trials: median gap of all trials of the tuning "
    "problem."
)


def cells(line: summary.Line, seeds: int) -> list[str]:
    """A line's entries for `HEAD`; the name shows if it has fewer than `seeds` seeds."""

    def number(field, form):
        value = line.figures.get(field, np.nan)
        return format(value, form) if np.isfinite(value) else "-"

    return [
        line.name if len(line.seeds) >= seeds else f"{line.name} ({len(line.seeds)} of {seeds} seeds)",
        *(number(field, ".1f") for field in ("UA", "RA", "TA", "MIA")),
        number("gap", ".2f") + ("*" if line.tied else ""),
        f"{line.gap.low:.2f} to {line.gap.high:.2f}" if line.gap else "-",
        number("kl_forget", ".2f"),
        number("share_of_retraining", ".1f"),
        number("passes_of_retraining", ".1f"),
        f"{np.median(line.trials):.1f}" if line.trials else "",
    ]


def markdown(lines: list[summary.Line], seeds: int) -> str:
    """A Markdown table."""
    table = [list(HEAD), ["---"] + ["---:"] * (len(HEAD) - 1), *(cells(line, seeds) for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def latex(lines: list[summary.Line], seeds: int) -> str:
    """A LaTeX table for the package booktabs, with the least gap and those tied with it in bold."""
    escape = lambda text: text.replace("%", r"\%").replace("_", r"\_")
    body = []
    for line in lines:
        entries = [escape(cell) for cell in cells(line, seeds)]
        if line.tied:
            entries[5] = rf"\textbf{{{entries[5].rstrip('*')}}}"
        body.append(" & ".join(entries) + r" \\")
    head = " & ".join(map(escape, HEAD)) + r" \\"
    rule = [r"\begin{tabular}{l" + "r" * (len(HEAD) - 1) + "}", r"\toprule", head, r"\midrule"]
    return "\n".join([*rule, *body, r"\bottomrule", r"\end{tabular}", ""])


def show(
    name: str,
    out: Path,
    form: str,
    console: Console,
    forget: Collection[str] = (),
    seeds: Collection[int] = (),
    methods: Collection[str] = (),
) -> None:
    """Prints the tables of a design from the rows in `out`, one for each of the design's `scores`.

    Args:
      name: Name of the design.
      out: Folder of `rows.jsonl`.
      form: "terminal", "markdown" or "latex".
      console: Where they are printed.
      forget: Forget sets of the design; all if empty.
      seeds: Seeds to report; the design's if empty.
      methods: Methods to show besides the original and the retrained model; all if empty. They are compared with all
        that have rows.
    """
    design = designs.of_seeds(name, seeds)
    found = [row for row in saved.read(out / "rows.jsonl") if row["design"] == name]
    if forget:
        found = [row for row in found if row["forget"] in forget]
    there = {row["seed"] for row in found} - {design.tuning_seed}
    if not there & set(design.seeds):
        of = f"{', '.join([name, *forget])}, seeds {', '.join(map(str, design.seeds))},"
        others = f"; there are rows of seeds {', '.join(map(str, sorted(there)))}" if there else ""
        console.print(f"no rows of {of} in {out}{others}", highlight=False, soft_wrap=True)
        return
    for case in design.cases:
        for score in design.scores:
            lines = summary.lines_of(found, name, design, case, score)
            if methods:
                of_method = lambda line: line.name.removesuffix(f", {tuning.UNTUNED}")
                lines = [line for line in lines if of_method(line) in (*REFERENCES, *methods)]
            if not lines:
                continue
            title = f"{name}, {case.forget}: settings {CHOSEN[score]}"
            if form == "terminal":
                console.print(_terminal(lines, title, len(design.seeds), console.width))
            else:
                console.print(title, highlight=False)
                render = {"markdown": markdown, "latex": latex}[form]
                console.print(render(lines, len(design.seeds)), highlight=False, markup=False, soft_wrap=True)
    console.print(LEGEND.format(seeds=len(design.seeds)), style="dim", highlight=False)


def _terminal(lines, title, seeds, width):
    shown = [index for index, head in enumerate(HEAD) if width >= WIDE or head not in NARROW_LACKS]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index in shown:
        table.add_column(HEAD[index], justify="right" if index else "left", no_wrap=True)
    for line in lines:
        style = "dim" if line.name in REFERENCES else "bold" if line.tied else None
        entries = cells(line, seeds)
        table.add_row(*(entries[index] for index in shown), style=style, end_section=line.name == "retrained")
    return table


def show_methods(console: Console) -> None:
    """Prints the table of methods."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    # A narrow terminal has no room for all columns; names are never broken.
    heads = ("method", "source", "passes (F forward, B backward)", "needs", "tuned")
    shown = len(heads) if console.width >= WIDE else 3
    for head in heads[:shown]:
        table.add_column(head, no_wrap=head == "method")
    for name, method in METHODS.items():
        cells = name, method.paper, method.passes, method.needs, ", ".join(method.space)
        table.add_row(*cells[:shown])
    console.print(table)
    some = {name: method.optimizer_settings for name, method in METHODS.items()}
    fewer = [f"{n} ({', '.join(read) or 'none'})" for n, read in some.items() if read != OPTIMIZER_SETTINGS]
    told = f"Each also reads the settings {', '.join(OPTIMIZER_SETTINGS)}, except {', '.join(fewer)}."
    console.print(told, highlight=False)
    if shown < len(heads):
        console.print(f"A terminal of {WIDE} columns also shows what each method needs and which settings are tuned.")
