"""The demo's page for a language model: the answers of every model, and a table of figures."""

import html

from eupmu_jax.benchmark import persons
from eupmu_jax.commands.document import document, figures, made_by

COLUMNS = ("prob", "ROUGE-L", "error", "RE")
LEGEND = (
    ("prob", "length-normalised probability of the right answers about forgotten persons"),
    ("ROUGE-L", "recall of the model's own answers about them"),
    ("error", "% of the tokens of the right answers about them that the model does not predict"),
    ("RE", "the same for a sample of the questions about retained persons"),
)
KINDS = {"forgotten": "Forgotten persons", "kept": "Similar persons, retained", "world": "General knowledge"}


def cells(row: dict) -> list[str]:
    """The row's entries for `COLUMNS`, as text."""
    errors = [f"{100 * row[name]:.1f}" for name in ("forget_error", "retain_error")]
    return [f"{row['probability']:.3f}", f"{row['rouge']:.3f}", *errors]


def headline(rows: list[dict]) -> str:
    """How near EUPMU came to the level of persons who were never shown, and at what cost."""
    original, retrained, ours = rows
    error = lambda row, name="forget_error": f"{100 * row[name]:.1f} %"
    return (
        f"EUPMU mispredicts {error(ours)} of the tokens in the right answers about forgotten persons (before: "
        f"{error(original)}; retrained: {error(retrained)}). Its target is the original model's error on persons who "
        f"were never shown, {error(ours, 'target')}. On retained persons it mispredicts {error(ours, 'retain_error')} "
        f"(before: {error(original, 'retain_error')})."
    )


def render(rows: list[dict]) -> str:
    """The page.

    Args:
      rows: As `demo_persons.run` writes them.
    """
    first = rows[0]
    title = html.escape(f"{persons.FORGOTTEN} persons, SmolLM2-135M: seed {first['seed']}")
    body = _PAGE.format(
        title=title,
        headline=html.escape(headline(rows)),
        figures=figures(rows, COLUMNS, cells, LEGEND, [rows[-1]["method"]]),
        answers="\n".join(_answers(rows, kind) for kind in KINDS),
        provenance=made_by(first),
        forgotten=persons.FORGOTTEN,
        retained=persons.RETAINED,
    )
    return document(f"eupmu demo: {title}", body)


def _answers(rows, kind):
    """A table of questions with the right answer and each model's answer."""
    cell = lambda text: f"<td>{html.escape(text)}</td>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("right", *(row["method"] for row in rows)))
    lines = [
        f"<tr><th>{html.escape(question)}</th>{cell(right)}"
        + "".join(cell(row["answers"][kind][k][2]) for row in rows)
        + "</tr>"
        for k, (question, right, _) in enumerate(rows[0]["answers"][kind])
    ]
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
    return f'<h2>{KINDS[kind]}</h2>\n<div class="wide answers">{table}</div>'


_PAGE = """<style>.answers th, .answers td {{ text-align: left; white-space: normal; vertical-align: top; }}
.answers th:first-child {{ width: 24%; }}</style>
<h1>A language model forgets persons</h1>
<p class="sub">{title}</p>
<p class="headline">{headline}</p>
{figures}
{answers}
<h2>What this page does not show</h2>
<p>There is one seed. The original model is SmolLM2-135M-Instruct, fine-tuned on questions about {forgotten} persons to
be forgotten and {retained} others; "retrained" is fine-tuned on the others alone. The pretrained model may have known
some of them already. For TOFU's forget quality and utility, and for what relearning some persons recovers of the
others, see experiments/persons.</p>
<footer>{provenance}</footer>
"""
