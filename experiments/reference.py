"""Builds the API pages from the docstrings, with rendered mathematics.

Command:  uv run --extra docs python experiments/reference.py
Time:     15 seconds.
Result:   build/reference/index.html.
"""

import importlib
import pkgutil
import re
import typing
from pathlib import Path

import chex
import numpy.typing
import optax
import pdoc.docstrings
import pdoc.extract

# Private modules, and the commands, which explain themselves with --help.
HIDDEN = r"!eupmu_jax\.(.+\.)?_|eupmu_jax\.commands"
CHEX = ("Array", "ArrayTree", "Numeric", "PRNGKey")


def specifications() -> list[str]:
    """What to ask pdoc for: unless named, it skips a module that the `__all__` of its package does not list."""
    asked = ["eupmu_jax", HIDDEN]
    shown = set(pdoc.extract.walk_specs(asked))
    for module in pkgutil.walk_packages(importlib.import_module("eupmu_jax").__path__, "eupmu_jax."):
        if module.name not in shown and not re.match(HIDDEN[1:], module.name):
            asked.insert(-1, module.name)
            shown.update(pdoc.extract.walk_specs([module.name, HIDDEN]))
    return asked


def with_tables(docstring: str) -> str:
    """The docstring with its tables as Markdown tables, and without thin spaces, which Markdown misreads."""
    rule = r"^[ \t]*=+(?: +=+)+[ \t]*\n"

    def markdown(match):
        edges = [edge.start() for edge in re.finditer(r"=+", match[0].splitlines()[0])]
        lines = [line for line in match[0].splitlines() if line.strip("= \t")]
        cells = [[line[a:b].strip() for a, b in zip(edges, [*edges[1:], None], strict=True)] for line in lines]
        rows: list = []
        for row in cells:
            if row[0] or not rows:
                rows.append(row)
            else:
                rows[-1] = [f"{above} {below}".strip() for above, below in zip(rows[-1], row, strict=True)]
        rows.insert(1, ["---"] * len(edges))
        escape = lambda cell: cell.replace("|", r"\|")
        return "\n" + "".join(f"| {' | '.join(map(escape, row))} |\n" for row in rows) + "\n"

    table = re.compile(rf"{rule}.*\n{rule}(?:.*\n)*?{rule}", re.MULTILINE)
    return table.sub(markdown, docstring.replace(r"\!", "") + "\n")


def main():
    # Show these types by name: their definitions fill half a page, and one is recursive.
    others = (numpy.typing, "ArrayLike"), (optax, "OptState"), (optax, "Schedule")
    for module, name in (*((chex, name) for name in CHEX), *others):
        alias = typing.NewType(name, object)
        alias.__module__ = module.__name__
        setattr(module, name, alias)
    asked = specifications()
    for name in pdoc.extract.walk_specs(asked):
        importlib.import_module(name)
    # The docstring of a tuple already lists its fields.
    for tuple_class in tuple.__subclasses__():
        if tuple_class.__module__.startswith("eupmu_jax"):
            for field in tuple_class._fields:
                getattr(tuple_class, field).__doc__ = ""
    convert = pdoc.docstrings.rst
    pdoc.docstrings.rst = lambda contents, source: convert(with_tables(contents), source)
    pdoc.render.configure(docformat="google", math=True, show_source=False, footer_text="eupmu_jax")
    pdoc.pdoc(*asked, output_directory=Path("build/reference"))


if __name__ == "__main__":
    main()
