"""Builds the API pages from the docstrings, with rendered mathematics.

Command:  uv run --extra docs python experiments/reference.py
Time:     ten seconds.
Result:   build/reference/index.html.
"""

import importlib
import re
import typing
from pathlib import Path

import chex
import optax
import pdoc.docstrings
import pdoc.extract

MODULES = (
    "eupmu_jax",
    "eupmu_jax.surgery",
    "eupmu_jax.gradients",
    "eupmu_jax.methods",
    "eupmu_jax.models",
    "eupmu_jax.data",
    "eupmu_jax.metrics",
    "eupmu_jax.training",
    "eupmu_jax.benchmark",
    r"!eupmu_jax\.(.+\.)?_",
)
CHEX = ("Array", "ArrayTree", "Numeric", "PRNGKey")


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
    for module, name in (*((chex, name) for name in CHEX), (optax, "OptState"), (optax, "Schedule")):
        alias = typing.NewType(name, object)
        alias.__module__ = module.__name__
        setattr(module, name, alias)
    for name in pdoc.extract.walk_specs(MODULES):
        importlib.import_module(name)
    # The docstring of a tuple already lists its fields.
    for tuple_class in tuple.__subclasses__():
        if tuple_class.__module__.startswith("eupmu_jax"):
            for field in tuple_class._fields:
                getattr(tuple_class, field).__doc__ = ""
    convert = pdoc.docstrings.rst
    pdoc.docstrings.rst = lambda contents, source: convert(with_tables(contents), source)
    pdoc.render.configure(docformat="google", math=True, show_source=False, footer_text="eupmu_jax")
    pdoc.pdoc(*MODULES, output_directory=Path("build/reference"))


if __name__ == "__main__":
    main()
