"""The demo of a language model, with a toy model: its rows, answers, table and page, and what it refuses."""

import html
import io
import re

import pytest
from rich.console import Console

from eupmu_jax.benchmark import rows
from eupmu_jax.commands import demo_persons, persons_page


@pytest.fixture(scope="module")
def ran(toy_persons, tmp_path_factory):
    """The folder, rows and output of a demo of few steps."""
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_persons, "STEPS", 4)
        found = demo_persons.run(0, out, Console(file=printed, width=100))
    return out, found, printed.getvalue()


@pytest.mark.slow
def test_every_model_has_a_row_and_answers(ran):
    out, found, printed = ran
    assert [row["method"] for row in found] == ["original", "retrained", "EUPMU"]
    assert rows.read(out / "rows.jsonl") == found
    for row in found:
        assert all(0 <= row[name] <= 1 for name in ("probability", "rouge", "forget_error", "retain_error"))
        assert list(row["answers"]) == list(persons_page.KINDS)
    assert 0 < found[-1]["target"] < 1
    question, right, _ = found[0]["answers"]["forgotten"][0]
    assert question in printed
    assert right in printed
    assert persons_page.headline(found)[:40] in printed


@pytest.mark.slow
def test_the_page_is_self_contained_and_agrees_with_the_rows(ran):
    out, found, _ = ran
    page = (out / "report.html").read_text()
    assert html.escape(persons_page.headline(found)) in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for kind in persons_page.KINDS:
        assert found[0]["answers"][kind][0][0] in page
    assert "certified" not in page


def test_a_folder_with_rows_of_another_experiment_is_refused(tmp_path):
    rows.append(tmp_path / "rows.jsonl", {"data": "digits"})
    with pytest.raises(ValueError, match=r"whose rows\.jsonl has rows of something else"):
        demo_persons.run(0, tmp_path, Console(quiet=True))
