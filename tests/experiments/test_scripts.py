"""Scripts that a reader copies run to the end; they assert what they claim."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from eupmu_jax.benchmark import rows
from eupmu_jax.commands import demo
from eupmu_jax.data import passages
from eupmu_jax.methods import METHODS
from experiments import parts
from experiments.demo import tune
from experiments.passages import run as passages_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.slow
def test_surgery_can_be_added_to_an_existing_training_loop(capsys):
    runpy.run_path(str(EXPERIMENTS / "examples" / "training_loop.py"))
    assert "of the way" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_a_users_own_task_runs(capsys):
    runpy.run_path(str(EXPERIMENTS / "examples" / "own_task.py"))
    assert "task.num_classes: got None, but boundary shrink needs it" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_a_flax_model_forgets_to_the_level_of_unseen_digits(capsys):
    names = runpy.run_path(str(EXPERIMENTS / "examples" / "flax_model.py"))
    assert "error on unseen digits" in capsys.readouterr().out
    level = names["result"].level
    assert level.kept
    assert level.comparison.low <= 0 <= level.comparison.high


@pytest.mark.long
def test_the_example_on_eight_devices_runs():
    script = str(EXPERIMENTS / "examples" / "eight_devices.py")
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.slow
def test_the_example_of_a_users_own_model_is_short_and_forgets(capsys):
    script = EXPERIMENTS / "own_model" / "run.py"
    assert len(script.read_text().splitlines()) <= 60
    runpy.run_path(str(script), run_name="__main__")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "retain" in line and "%" in line}
    accuracy = {name: [float(word) for word in line.split() if word[0].isdigit()] for name, line in lines.items()}
    assert accuracy["original"][:2] == [100.0, 100.0]
    assert accuracy["unlearned"][0] < accuracy["original"][0]
    # Forgotten digits are like unseen ones, as far as 150 of them can show.
    assert abs(accuracy["unlearned"][0] - accuracy["unlearned"][2]) < 3
    assert accuracy["unlearned"][1] > 99


@pytest.fixture
def optimized():
    """Enables XLA's optimizations for tests that are dominated by computation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_only_a_newer_version_of_a_method_runs_again_on_passages():
    present = {"EUPMU": METHODS["EUPMU"].version, "SCRUB": METHODS["SCRUB"].version}
    made = [{"model": "original"}, {"model": "retrained"}]
    made += [{"model": name, "version": version} for name, version in present.items()]
    assert passages_run.missing([], present) == ["original", "retrained", *present]
    assert passages_run.missing(made, present) == []
    older = {"model": "EUPMU", "version": present["EUPMU"] - 1}
    assert passages_run.missing([*made[:2], older, made[3]], present) == ["EUPMU"]
    both = [*made[:2], older, *made[2:]]
    assert parts.newest(both, "model") == made


@pytest.mark.long
@pytest.mark.usefixtures("optimized")
def test_a_language_model_forgets_passages(tmp_path):
    try:
        passages.load(passages_run.LENGTH)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = {"methods": ("EUPMU",), "count": 50, "length": 32, "epochs": 100, "steps": 20}
    found = passages_run.run(tmp_path / "rows.jsonl", 0, {"command": "test"}, **options)
    figures = {row["model"]: row for row in found}
    assert list(figures) == ["original", "retrained", "EUPMU"]
    original, retrained, unlearned = (figures[name] for name in ("original", "retrained", "EUPMU"))
    assert original["forget_memorised"] > retrained["forget_memorised"] + 20
    assert unlearned["forget_memorised"] < original["forget_memorised"]
    assert unlearned["retain_memorised"] > unlearned["forget_memorised"]
    assert rows.read(tmp_path / "rows.jsonl") == [row | {"command": "test"} for row in found]
    assert passages_run.run(tmp_path / "rows.jsonl", 0, {"command": "test"}, **options) == []


@pytest.mark.slow
def test_the_demo_is_tuned_and_existing_trials_are_not_run_again(tmp_path, monkeypatch):
    # BUG: after tuning all other methods, the command failed at EUPMU, which is not tuned.
    monkeypatch.setattr(tune, "ROWS", tmp_path / "tuning.jsonl")
    monkeypatch.setattr(tune, "SETTINGS", tmp_path / "settings.json")
    chosen = ["--trials", "1", "--seeds", "100", "--kind", "class", "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tune.py", *chosen])
    monkeypatch.setattr(tune, "TUNED", ["fine-tuning", "EUPMU implicit"])
    tune.main()
    before = rows.read(tune.ROWS)
    assert [row["method"] for row in before] == tune.TUNED
    tune.main()
    assert rows.read(tune.ROWS) == before
    assert set(json.loads(tune.SETTINGS.read_text())["digits"]["class"]["methods"]) == set(tune.TUNED)


def test_every_method_of_the_demo_except_eupmu_is_tuned():
    assert set(tune.TUNED) == set(demo.METHODS) - {"EUPMU"}
    for method in tune.TUNED:
        assert "learning_rate" in tune.draw(method, np.random.default_rng(0))
