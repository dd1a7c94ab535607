"""Generates every table of the pages and of the README from the saved rows, and optionally draws the figures.

Command:  uv run python experiments/pages.py                                  (and with --figures)
Time:     half a minute; a minute with figures.
Result:   replaces the text between `<!-- name -->` and `<!-- end -->` in README.md and in experiments/*/page.md;
          figures go to experiments/figures, where git tracks those that a page shows.

An experiment's `page.py` has a function `blocks`, which returns each table or paragraph by its name, and may have a
function `draw`, which writes figures into a folder. A name may be used in any page, but only once.
"""

import argparse
import importlib
import re
from pathlib import Path
from types import ModuleType

EXPERIMENTS = Path(__file__).parent
FIGURES = EXPERIMENTS / "figures"


def pages() -> list[Path]:
    """The README and the page of every experiment."""
    return [EXPERIMENTS.parent / "README.md", *sorted(EXPERIMENTS.glob("*/page.md"))]


def makers() -> list[ModuleType]:
    """The `page` module of every experiment that has one."""
    return [importlib.import_module(f"experiments.{p.parent.name}.page") for p in sorted(EXPERIMENTS.glob("*/page.py"))]


def blocks() -> dict[str, str]:
    """All tables and paragraphs by name."""
    return {name: text for maker in makers() for name, text in maker.blocks().items()}


def fill(page: str, made: dict[str, str]) -> str:
    """The page with its blocks replaced.

    Raises:
      ValueError: For a block that no experiment generates.
    """

    def block(match):
        if match[1] not in made:
            raise ValueError(f"page: got a block {match[1]!r}, expected one of {', '.join(made)}")
        return f"<!-- {match[1]} -->\n{made[match[1]]}<!-- end -->"

    return re.sub(r"<!-- (.+?) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", action="store_true", help="draw them too")
    arguments = parser.parse_args()
    made = blocks()
    for page in pages():
        page.write_text(fill(page.read_text(), made))
    if arguments.figures:
        for maker in makers():
            if hasattr(maker, "draw"):
                maker.draw(FIGURES)


if __name__ == "__main__":
    main()
