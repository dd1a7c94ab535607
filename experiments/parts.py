"""The parts of pages: tables, paragraphs and figures."""

import io
import math
import re
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from eupmu_jax.benchmark.style import STYLE as COMMON_STYLE

# Text stays text: it can be searched, and takes a third of the space of outlines.
TEXT = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
STYLE = COMMON_STYLE | TEXT | {"axes.axisbelow": True, "legend.frameon": False, "path.simplify": False}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose other columns are numbers."""
    whole = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in whole)


def number(value: float | None) -> float:
    """A number from a row, in which NaN and infinity are stored as null."""
    return math.nan if value is None else value


def newest(found: list[dict], *fields: str) -> list[dict]:
    """The latest row for each combination of values in these fields."""
    return list({tuple(row[name] for name in fields): row for row in found}.values())


def of_version(found: list[dict], present: int) -> str:
    """A note if some rows of a method are by older versions; empty if all are by the current one."""
    older = sorted({row["version"] for row in found} - {present})
    return f" (in part by version {', '.join(map(str, older))})" if older else ""


def paragraph(text: str) -> str:
    """A text wrapped like the lines of the pages."""
    # Lines do not break between a number and its %, nor at hyphens.
    joined = re.sub(r"(\d) %", "\\1\u00a0%", text)
    return textwrap.fill(joined, 128, break_on_hyphens=False).replace("\u00a0", " ") + "\n"


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG that is reproducible for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    path.write_text(slim(path.read_text()))


def save_samples(figure: Figure, path: Path) -> None:
    """Writes a PNG of 64 colours, which takes a third of the space of full colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def slim(svg: str) -> str:
    """Matplotlib's SVG in a third of its bytes: styles as classes, coordinates in tenths, no empty groups."""
    svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Within tags only: numbers of labels stay as they are.
    in_tenths = lambda tag: re.sub(
        r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag[0]
    )
    svg = re.sub(r"<[^>]*>", in_tenths, svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda name: name[0] if name[1] in used else "", svg)
    styles: dict[str, int] = {}
    svg = re.sub(r'style="([^"]+)"', lambda style: f'class="s{styles.setdefault(style[1], len(styles))}"', svg)
    rules = "".join(f".s{number}{{{style}}}" for style, number in styles.items())
    svg = re.sub(r"\s+", " ", svg.replace("</style>", rules + "</style>", 1)).replace("> <", "><").strip()
    opened, kept = [], []
    for tag in re.split(r"(</?g\b[^>]*>)", svg):
        if tag.startswith("</g"):
            kept.append(tag if opened.pop() != "<g>" else "")
        else:
            opened += [tag] if re.match(r"<g\b", tag) else []
            kept.append(tag if tag != "<g>" else "")
    return "".join(kept) + "\n"
