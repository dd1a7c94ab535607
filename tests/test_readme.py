"""The README gives the test command that continuous integration runs, is short, and has no broken links."""

import re
from pathlib import Path

from eupmu_jax import aggregators
from eupmu_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^(uv run .*pytest.*)$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_it_can_be_read_in_five_minutes():
    assert len(README.splitlines()) <= 160


def test_it_counts_all_methods_and_aggregators():
    assert f"{len(METHODS)} methods share one interface" in README
    assert "PCGrad, CAGrad, MGDA, UPGrad, NGDiff and eleven more" in README
    assert len([name for name in aggregators.__all__ if name.islower()]) == 5 + 11


def test_its_links_are_not_broken():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
