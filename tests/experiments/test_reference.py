"""Formulas of docstrings render on the API pages."""

import re
from pathlib import Path

import pytest

import eupmu_jax

SOURCES = sorted(Path(eupmu_jax.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("broken", [r":math:`[^`\n]*\n", r"\.\. math::\n(?:[ \t]+\S.*\n)*?[ \t]+[-+*] "])
def test_no_formula_is_written_so_that_pdoc_takes_it_for_text_or_for_a_list(broken):
    # pdoc reads a role on one line only, and Markdown takes a line that begins with a sign for a list.
    assert [path.name for path in SOURCES if re.search(broken, path.read_text())] == []
