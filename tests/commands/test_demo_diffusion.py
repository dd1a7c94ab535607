"""The demo of a diffusion model at a small scale: its rows, table and page, and what it refuses."""

import functools
import io
import re

import numpy as np
import pytest
from rich.console import Console

from eupmu_jax.benchmark import diffusion, rows
from eupmu_jax.commands import demo_diffusion, diffusion_page


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder, rows and output of a demo of very few steps."""
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    small = {"FORGOTTEN": 8, "RETAINED": 2, "ATTACKED": 8}
    cached = diffusion.functions, diffusion.plain_task
    [function.cache_clear() for function in cached]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "DiT", functools.partial(diffusion.DiT, width=16, layers=1, heads=2))
        for name, value in small.items():
            patch.setattr(diffusion, name, value)
        for name, value in {"METHODS": ("EUPMU",), "EPOCHS": 1, "STEPS": 4, "PROBES": 2}.items():
            patch.setattr(demo_diffusion, name, value)
        patch.setattr(diffusion, "relearned_row", lambda params, forgotten, seed: params)
        found = demo_diffusion.run("class:4", 0, out, Console(file=printed, width=80))
    [function.cache_clear() for function in cached]
    return out, found, printed.getvalue()


@pytest.mark.slow
def test_every_model_has_a_row_with_its_figures(ran):
    out, found, printed = ran
    assert [row["method"] for row in found] == ["original", "retrained", "EUPMU"]
    assert rows.read(out / "rows.jsonl") == found
    for row in found:
        assert all(0 <= row[name] <= 100 for name in ("UA", "RA", "relearned"))
        assert row["method"] in printed
    ours = found[-1]
    assert 0 < ours["limit"] < ours["level"]["limit"]
    assert ours["history"]["step"][-1] == 4
    assert found[0]["rise"] == 0


@pytest.mark.slow
def test_the_page_is_self_contained_and_agrees_with_the_rows(ran):
    out, found, _ = ran
    page = (out / "report.html").read_text()
    assert diffusion_page.headline(found) in page.replace("&#x27;", "'")
    assert page.count("<svg") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "certified" not in page


def test_each_model_has_a_line_of_samples_with_the_forgotten_class_first():
    rng = np.random.default_rng(0)
    images = {name: rng.uniform(-1, 1, (10, 6, 8, 8)) for name in ("original", "EUPMU")}
    figure = diffusion_page.grid(images, forgotten=4)
    first, second = figure.axes
    assert [axes.get_ylabel() for axes in (first, second)] == ["original", "EUPMU"]
    assert [label.get_text() for label in first.get_xticklabels()][:2] == ["“4”", "“0”"]
    shown = first.images[0].get_array()
    np.testing.assert_allclose(shown[1:9, 4:12], images["original"][4, 0])
    assert shown.shape == (20, 360)


@pytest.mark.parametrize("forget", ["random:10%", "class:12", "4"])
def test_only_a_class_of_digits_can_be_forgotten(forget, tmp_path):
    with pytest.raises(ValueError, match=f"forget: got '{forget}', expected a class from class:0 to class:9"):
        demo_diffusion.run(forget, 0, tmp_path, Console())
    assert not list(tmp_path.iterdir())


def test_rows_of_another_experiment_are_left_alone(tmp_path):
    rows.append(tmp_path / "rows.jsonl", {"data": "digits", "gap": 1.0})
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="has rows of something else; expected a folder of its own"):
        demo_diffusion.run("class:4", 0, tmp_path, Console())
    assert (tmp_path / "rows.jsonl").read_bytes() == before
