"""Makes every table of the pages and of the README from the saved rows, and draws the figures if asked to.

Command:  uv run python experiments/pages.py                                  (and with --figures)
Time:     half a minute; with figures a minute.
Result:   what stands between `<!-- name -->` and `<!-- end -->` in README.md and in experiments/*/page.md is made anew;
          figures go to experiments/figures, where git keeps those that a page shows.

An experiment's `page.py` has a function `blocks`, which gives each table or paragraph by its name, and may have one
`draw`, which writes figures into a folder. A name may stand in any page, once.
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
    """The module `page` of every experiment that has one."""
    return [importlib.import_module(f"experiments.{p.parent.name}.page") for p in sorted(EXPERIMENTS.glob("*/page.py"))]


def blocks() -> dict[str, str]:
    """Every table and paragraph by its name."""
    return {name: text for maker in makers() for name, text in maker.blocks().items()}


def fill(page: str, made: dict[str, str]) -> str:
    """The page with its blocks made anew.

    Raises:
      ValueError: For a block that none of the experiments makes.
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
