"""From ids to parameters in a folder: what is asked, what is reached, and that repeating a run changes nothing."""

import json
import shutil

import numpy as np
import pytest

from eupmu_jax.commands import unlearn as command
from eupmu_jax.service import _again, deletion, records, retraining, user_file
from eupmu_jax.tasks import as_examples
from eupmu_jax.training import _alone, checkpoints, levels
from eupmu_jax.training._digest import digest

IDS = np.arange(30)
ASKED = deletion.Asked(steps=60, forget_batch=16, retain_batch=48)


def run(file, out, asked=ASKED, ids=IDS, on_step=lambda: None, after=None):
    return deletion.run(user_file.load(file, deletion.NEEDED), ids, out, asked, "a command", after, on_step)


# A regression in which 200 weights memorise 200 numbers, with squared errors so large that 0.01 of them is nothing.
PRICES = """
import jax, jax.numpy as jnp, numpy as np, eupmu_jax as eupmu

random = np.random.default_rng(0)
x = random.normal(size=(300, 200)).astype(np.float32)
y = (1e4 * x[:, :5].sum(1) + 1e4 * random.normal(size=300)).astype(np.float32)
data, held_out = {"x": x[:200], "y": y[:200]}, {"x": x[200:], "y": y[200:]}
params = np.linalg.lstsq(x[:200], y[:200] / 1e4, rcond=None)[0]
errors = lambda outputs, batch: (1e4 * outputs - batch["y"]) ** 2
mean = lambda outputs, batch: jnp.mean(errors(outputs, batch))
task = eupmu.Task(
    lambda params, batch, key: batch["x"] @ params, mean, {"ascent": lambda *args: -mean(*args)}, error=errors
)
"""


@pytest.mark.slow
def test_the_default_limit_follows_the_unit_of_the_error(tmp_path):
    # BUG: the limit was 0.01 in any unit, so with errors in the millions nothing was forgotten.
    file, out = tmp_path / "prices.py", tmp_path / "run"
    file.write_text(PRICES)
    own = user_file.load(file, deletion.NEEDED)
    reached = deletion.run(own, IDS[:10], out, ASKED, "a command")
    level, asked = reached["level"], asked_of(out)
    assert asked["limit"] is None
    assert level["kept"]
    assert level["target"] > 1e7
    assert level["limit"] == pytest.approx(0.0949 * level["target"], rel=1e-3)
    assert level["forget_error"] > 0.1 * level["target"]
    sets = deletion.parts(as_examples("data", own["data"]), IDS[:10], IDS[:0])
    end = checkpoints.load(out / "params", own["params"])[0]
    assert _again.untrue(own, asked, records.read(out / "reached.json", "reached"), own["params"], end, sets) == []
    with pytest.raises(ValueError, match=r"limit: got 1e\+39, expected a number above 0, in hundredths of the error"):
        deletion.run(own, IDS[:10], out, ASKED._replace(limit=1e39), "a command")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the run ends at")
@pytest.mark.parametrize("unit", [1.0, 1e6])
def test_without_unseen_data_no_aim_counts_as_reached_where_none_is_known(unit, tmp_path):
    # BUG: a run that had forgotten nothing was reported to have reached its aim, and its request marked as unlearned.
    file, out = tmp_path / "prices.py", tmp_path / "run"
    text = PRICES.replace("data, held_out =", "data, unused =")
    file.write_text(text.replace("1e4 * outputs - batch", f"{unit} * 1e4 * outputs - {unit} * batch") + "\n")
    reached = deletion.run(user_file.load(file, deletion.NEEDED), IDS[:10], out, ASKED, "a command")
    assert not reached["met"] or reached["level"]["target"] == 1
    if unit > 1:
        assert "Without `held_out` no target is known" in command.said(reached, out)


def test_a_forget_set_that_was_unknown_from_the_start_is_reported_as_such(tmp_path):
    # BUG: the report was that too much is forgotten compared with unseen data.
    level = {"kept": True, "target": 0.5, "comparison": {"low": 0.1}, "forget_error": 2.0, "retain_error": 0.0}
    level |= {"start": 0.0, "limit": 0.1, "source": "unseen data"}
    reached = {"level": level, "met": False, "rates": False, "examples": {"forget": 1, "retain": 9}}
    figures = {"figures": {"original": {"forget_error": 2.0}}}
    said = command.said(reached | figures, tmp_path)
    assert "There was nothing to forget: the error was 2 before the run." in said
    assert "the target is 0.5, that of unseen data.\n" in said
    assert "that of unseen data (at least 0.49, given its noise)" in command.said(
        reached | figures | {"least": 0.49}, tmp_path
    )
    # BUG: the call named a module that `import eupmu_jax` does not load.
    params = {"a": np.arange(2.0, dtype=np.float32)}
    checkpoints.save(tmp_path / "params", params, {})
    advised = said.split("the parameters: ")[1].replace("checkpoints.load", "loaded = checkpoints.load")
    exec(advised, own := {"params": params})
    assert own["loaded"]["a"].tolist() == [0.0, 1.0]


def asked_of(out):
    return records.read(out / "asked.json", "asked")


def test_a_run_reaches_its_aim_within_the_limit_and_is_not_repeated(file, tmp_path):
    steps, out = [], tmp_path / "run"
    reached = run(file, out, on_step=lambda: steps.append(1))
    assert len(steps) == ASKED.steps
    assert reached["met"]
    level = reached["level"]
    assert level["forget_error"] > 0
    assert level["retain_error"] <= level["limit"] == pytest.approx(level["start"] + 0.01)
    assert reached["examples"] == {"forget": 30, "retain": 270}
    assert {"versions", "device", "command"} <= set(reached)
    with np.load("params.npz") as saved:
        params, meta = checkpoints.load(out / "params", dict(saved), {})
    assert digest(params) == reached["params"]
    assert meta["asked"] == json.loads((out / "asked.json").read_text())
    assert run(file, out, on_step=pytest.fail) == reached


def test_exceeding_the_limit_or_missing_the_level_is_reported_as_not_met(file, tmp_path, monkeypatch):
    own, asked, ends = user_file.load(file, deletion.NEEDED), ASKED._replace(steps=2), []
    made = deletion.unlearn
    monkeypatch.setattr(deletion, "unlearn", lambda *args, **options: ends.append(made(*args, **options)) or ends[0])
    deletion.run(own, IDS, tmp_path / "run", asked, "a command")
    above, below = levels.Comparison(0.3, 0.2, 0.4, 0.0), levels.Comparison(-0.3, -0.4, -0.2, 0.0)
    changes = {
        "The limit was not kept; this is the nearest point found.": {"kept": False},
        "Too much was forgotten:": {"comparison": above, "kept": True},
        "The target was missed within the limit;": {"comparison": below, "kept": True},
    }
    for number, (said, changed) in enumerate(changes.items()):
        end = ends[0]._replace(level=ends[0].level._replace(**changed))
        monkeypatch.setattr(deletion, "unlearn", lambda *args, end=end, **options: end)
        reached = deletion.run(own, IDS, tmp_path / f"{number}", asked, "a command")
        assert not reached["met"]
        assert said in command.said(reached, tmp_path)


@pytest.mark.slow
def test_a_class_that_is_still_known_misses_the_aim_whatever_else_is_forgotten(file, tmp_path):
    labels = user_file.load(file, ("data",))["data"]["labels"]
    ids = np.unique([*np.flatnonzero(labels == 3), *range(30)])
    reached = run(file, tmp_path / "run", ASKED._replace(steps=1), ids=ids)
    comparison = reached["level"]["comparison"]
    assert comparison["low"] <= 0 <= comparison["high"]
    assert reached["level"]["kept"]
    assert not reached["met"]


def test_the_folder_of_another_run_is_left_unchanged_and_the_differences_are_named(file, tmp_path):
    out = tmp_path / "run"
    run(file, out, ASKED._replace(steps=2))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(
        ValueError, match=r"belongs to another run; got limit 2.0 \(there: 1.0\), ids .* expected the same"
    ):
        run(file, out, ASKED._replace(steps=2, limit=2.0), ids=IDS[1:])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def append(file, line):
    return file.write_text(f"{file.read_text()}{line}\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, out: run(f, out, ids=np.arange(300)), "ids: got all 300 examples, expected some to retain"),
        (lambda f, out: run(f, out, ASKED._replace(limit=0.0)), "limit: got 0.0, expected points of accuracy above 0"),
        (lambda f, out: run(f, out, ASKED._replace(limit=float("nan"))), "limit: got nan"),
        (lambda f, out: run(f, f / "run"), r"^out: cannot write to .*/run \(Not a directory\); expected a"),
        (lambda f, out: run(f, f.parent), "is not the folder of a run; expected an empty folder"),
        (lambda f, out: append(f, "params = dict") and run(f, out), "params: leaf the tree itself is type, expected "),
        (lambda f, out: f.write_text("data = 1") and run(f, out), "does not define `task`, `params`; expected"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(change, message, file, tmp_path):
    with pytest.raises(ValueError, match=message):
        change(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_refused_run_can_be_used_again(file, tmp_path):
    # BUG: from then on the folder was "of another run".
    with pytest.raises(ValueError, match="forget_batch: got 0, expected an int of at least 1"):
        run(file, tmp_path / "run", ASKED._replace(forget_batch=0))
    assert run(file, tmp_path / "run", ASKED._replace(steps=2))["passes"]["backward"] > 0


def test_the_folder_of_a_run_that_failed_before_it_saved_a_step_can_be_used_again(file, tmp_path):
    # BUG: smaller batches after a step that ran out of memory were those of another run.
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(file, tmp_path / "run", on_step=fail)
    assert run(file, tmp_path / "run", ASKED._replace(steps=2))["passes"]["backward"] > 0


def test_data_that_cannot_be_read_for_their_groups_leave_no_record(file, tmp_path, monkeypatch):
    # BUG: asked.json stayed, and the folder was then that of another run than the corrected one.
    def fail(*arguments):
        raise OSError("a file of labels is missing")

    monkeypatch.setattr(deletion, "is_compared", fail)
    own = user_file.load(file, deletion.NEEDED) | {"groups": np.arange(300) // 15}
    with pytest.raises(OSError, match="labels"):
        deletion.run(own, IDS, tmp_path / "run", ASKED, "a command")
    assert not (tmp_path / "run" / "asked.json").exists()


def test_a_folder_that_vanishes_does_not_hide_why_the_run_failed(file, tmp_path, monkeypatch):
    # BUG: the error was that asked.json could not be found.
    def fail(*arguments, **options):
        shutil.rmtree(tmp_path / "run")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(deletion, "unlearn", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(file, tmp_path / "run")


def test_a_damaged_record_is_named(file, tmp_path):
    out = tmp_path / "run"
    run(file, out, ASKED._replace(steps=2))
    (out / "asked.json").write_text('{"limit": 1')
    with pytest.raises(ValueError, match=r"out: .*asked.json is damaged; expected JSON that `eupmu` wrote"):
        run(file, out, ASKED._replace(steps=2))


@pytest.mark.slow
def test_a_finished_run_whose_parameters_were_deleted_is_not_reported_as_finished(file, tmp_path):
    # BUG: it printed its result, the place of the parameters included.
    out, asked = tmp_path / "run", ASKED._replace(steps=2)
    reached = run(file, out, asked)
    shutil.rmtree(out / "params")
    with pytest.raises(ValueError, match=r"^out: .*params is not there, expected .*; to make them again, delete"):
        run(file, out, asked)
    (out / "reached.json").unlink()
    assert run(file, out, asked)["params"] == reached["params"]


@pytest.mark.slow
def test_a_second_run_continues_from_the_first_and_does_not_retain_what_that_forgot(file, tmp_path):
    first = run(file, tmp_path / "first")
    second = run(file, tmp_path / "second", ids=np.arange(30, 50), after=tmp_path / "first")
    assert asked_of(tmp_path / "second")["params"] == first["params"]
    assert second["examples"] == {"forget": 20, "retain": 250}
    (earlier,) = asked_of(tmp_path / "second")["earlier"]
    level = first["level"]
    assert earlier == {"positions": IDS.tolist(), "target": level["target"], "interval": level["interval"]}
    run(file, tmp_path / "third", ASKED._replace(steps=2), ids=np.array([50]), after=tmp_path / "second")
    assert [len(one["positions"]) for one in asked_of(tmp_path / "third")["earlier"]] == [30, 20]


def other_data(file):
    file.write_text(file.read_text() + "data['labels'][0] += 1\n")
    return np.arange(30, 40)


def not_finished(first):
    (first / "reached.json").unlink()
    return np.arange(30, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, first: IDS[5:], "ids: got 5, 6, 7, 8, 9, which an earlier run forgot, expected positions that are"),
        (lambda f, first: np.arange(30, 300), "ids: got all 300 examples, expected some to retain"),
        (lambda f, first: not_finished(first), "reached.json is not there"),
        (lambda f, first: other_data(f), "is a run on other data than the file's, expected a run on the file's data"),
    ],
)
def test_runs_that_cannot_be_continued_from_are_refused_with_the_reason(change, message, file, tmp_path):
    run(file, tmp_path / "first", ASKED._replace(steps=2))
    ids = change(file, tmp_path / "first")
    with pytest.raises(ValueError, match=message):
        run(file, tmp_path / "second", ids=ids, after=tmp_path / "first")
    assert not (tmp_path / "second").exists()


class Source:
    """Examples that are produced on request."""

    def __init__(self, tree):
        self.tree = tree

    def __len__(self):
        return len(self.tree["labels"])

    def __getitem__(self, positions):
        return {name: array[positions] for name, array in self.tree.items()}


@pytest.mark.slow
def test_data_from_a_source_give_the_same_result_as_arrays(file, tmp_path):
    whole = file.read_text()
    file.write_text(whole + "from tests.service.test_deletion import Source\ndata = Source(data)\n")
    lazy = run(file, tmp_path / "lazy", ASKED._replace(steps=5))
    file.write_text(whole)
    tree = run(file, tmp_path / "tree", ASKED._replace(steps=5))
    assert asked_of(tmp_path / "lazy") == asked_of(tmp_path / "tree")
    assert lazy["figures"]["returned"]["retain_loss"] == pytest.approx(tree["figures"]["returned"]["retain_loss"], 1e-3)


def test_a_retrained_model_that_is_not_finite_is_refused(file):
    # BUG: the audit passed, and the command ended with a traceback.
    file.write_text(file.read_text() + "retrain = lambda positions: {k: v * np.nan for k, v in params.items()}\n")
    run(file, file.parent / "run", ASKED._replace(steps=2))
    with pytest.raises(ValueError, match=r"^retrain: got parameters that are not finite, expected those of a trained"):
        retraining.retrain(user_file.load(file, deletion.NEEDED), file.parent / "run")
    assert not (file.parent / "run" / retraining.RETRAINED).exists()


def test_two_processes_do_not_work_in_one_folder(file, tmp_path, monkeypatch):
    monkeypatch.setattr(_alone, "ALONE_SECONDS", 0.01)
    (tmp_path / "run").mkdir()
    with _alone.alone(tmp_path / "run"), pytest.raises(ValueError, match=r"^out: another run is using .*run;"):
        run(file, tmp_path / "run")
    assert run(file, tmp_path / "run", ASKED._replace(steps=2))["passes"]["backward"] > 0


def test_two_processes_do_not_retrain_in_one_folder(file, tmp_path, monkeypatch):
    # BUG: both trained, and wrote the same checkpoint at once.
    monkeypatch.setattr(_alone, "ALONE_SECONDS", 0.01)
    file.write_text(file.read_text() + "retrain = lambda positions: params\n")
    run(file, tmp_path / "run", ASKED._replace(steps=2))
    own = user_file.load(file, deletion.NEEDED)
    with _alone.alone(tmp_path / "run"), pytest.raises(ValueError, match=r"^out: another run is using .*run;"):
        retraining.retrain(own, tmp_path / "run")
    retraining.retrain(own, tmp_path / "run")
    with _alone.alone(tmp_path / "run"):
        # Nothing is left to do, so nothing is locked.
        retraining.retrain(own, tmp_path / "run")


def test_a_float64_model_can_be_read_back(file, tmp_path):
    # BUG: the parameters came back in float64, and were reported as damaged.
    file.write_text(file.read_text() + "params = {name: leaf.astype(np.float64) for name, leaf in params.items()}\n")
    reached = run(file, tmp_path / "run", ASKED._replace(steps=2))
    own = user_file.load(file, deletion.NEEDED)
    params, _ = checkpoints.load(tmp_path / "run" / "params", own["params"])
    assert digest(params) == reached["params"]


def test_a_float64_retrained_model_is_kept_in_the_dtype_of_the_parameters(file, tmp_path):
    widened = "retrain = lambda positions: {name: leaf.astype(np.float64) for name, leaf in params.items()}\n"
    file.write_text(file.read_text() + widened)
    run(file, tmp_path / "run", ASKED._replace(steps=2))
    own = user_file.load(file, deletion.NEEDED)
    retraining.retrain(own, tmp_path / "run")
    found = retraining.retrained_of(tmp_path / "run", own["params"], asked_of(tmp_path / "run"))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
