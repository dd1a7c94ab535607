"""The layout of every page: one self-contained HTML document, for screens of any width, dark mode and print."""

import html
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from eupmu_jax.benchmark.rows import replacing

# A table with more columns than this counts as long.
MANY = 7
_STYLE = """
:root { color-scheme: light dark; --text: #1c2026; --muted: #6b7078; --line: #eceef1; --best: #eef7f2; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --muted: #9aa0a8; --line: #2a2f36; --best: #14281f; --page: #14171b; }
  svg, i { filter: invert(0.92) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1040px;
  margin: 40px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 8px; }
.sub { color: var(--muted); margin: 4px 0 20px; } .headline { font-size: 17px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; }
tr.anchor { color: var(--muted); } tr.best { background: var(--best); font-weight: 600; }
i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
dl { display: grid; grid-template-columns: 70px 1fr; gap: 2px 12px; color: var(--muted); font-size: 13px; }
dl.facts { grid-template-columns: max-content 1fr; font-size: 14px; color: var(--text); }
code { overflow-wrap: anywhere; font-size: 12px; }
dt { font-weight: 600; } dd { margin: 0; } svg { width: 100%; height: auto; background: #fff; }
footer { color: var(--muted); font-size: 12px; margin-top: 36px; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { margin: 20px auto; padding: 0 12px; }
  th, td { padding: 5px 4px; font-size: 13px; } .long th:nth-child(n+7), .long td:nth-child(n+7) { display: none; }
  .wrap td { white-space: normal; } i { margin-right: 4px; }
  .figure { overflow-x: auto; } .figure svg { min-width: 640px; }
}
@media print {
  body { margin: 0; max-width: none; } h2, .figure { break-inside: avoid; } .wide { overflow: visible; }
  th, td { padding: 4px 5px; font-size: 11px; white-space: normal; }
}
"""


def document(title: str, body: str) -> str:
    """An HTML document; both arguments are HTML, with user input already escaped."""
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en">\n{head}\n<title>{title}</title>\n<style>{_STYLE}</style>\n{body}</html>\n'
    )


def figures(
    rows: list[dict],
    columns: Sequence[str],
    cells: Callable[[dict], list[str]],
    legend: Sequence[tuple[str, str]],
    best: Collection[str],
    colors: Mapping[str, str] | None = None,
) -> str:
    """A table with a line for each method, and a legend of its columns.

    The first two rows, the original and the retrained model, are grey, and the best are highlighted. With `colors`,
    each method has a swatch of its own.
    """
    lines = []
    for row in rows:
        name = row["method"]
        kind = ' class="best"' if name in best else ' class="anchor"' if row in rows[:2] else ""
        swatch = "" if colors is None else f'<i style="background:{colors[name]}"></i>'
        entries = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        lines.append(f"<tr{kind}><th>{swatch}{html.escape(name)}</th>{entries}</tr>")
    head = "".join(f"<th>{name}</th>" for name in columns)
    # On a narrow screen a long table shows only its first columns.
    kind = ' class="long"' if len(columns) > MANY else ""
    table, body = f"<table{kind}><thead><tr><th></th>{head}</tr></thead><tbody>", "\n".join(lines)
    terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in legend)
    return f'<div class="wide">{table}\n{body}\n</tbody></table></div>\n<dl>{terms}</dl>'


def made_by(row: dict) -> str:
    """Command, versions and device of a row, on one line."""
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return html.escape(f"{row['command']} | {versions} | {row['device']}")


def write(path: Path, page: str) -> None:
    """Writes a page atomically, in UTF-8 whatever the locale."""
    with replacing(path) as file:
        file.write(page.encode())
