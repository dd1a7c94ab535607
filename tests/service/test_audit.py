"""The audit: what an attack tells, what rounding and classes show, and the verdict with its exit code."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eupmu_jax import tasks
from eupmu_jax.commands import report as page
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.service import _judged, _measured, _verdict, attacks, audit, deletion, records, retraining, user_file
from eupmu_jax.tasks import as_examples
from eupmu_jax.tasks.examples import part_of
from eupmu_jax.training import checkpoints, levels
from eupmu_jax.training._reached import Reached
from eupmu_jax.training.levels import level_of

NUMBERS = st.lists(st.integers(0, 9), min_size=2, max_size=30)


@given(NUMBERS, NUMBERS)
def test_the_auc_is_the_share_of_pairs_and_turns_with_the_sides(losses, unseen):
    pairs = [(a < b) + 0.5 * (a == b) for a in losses for b in unseen]
    found = attacks.attack(np.array(losses), np.array(unseen))
    assert found.auc == pytest.approx(np.mean(pairs))
    assert attacks.attack(np.array(unseen), np.array(losses)).auc == pytest.approx(1 - found.auc)
    assert 0 <= found.low <= found.auc <= found.high <= 1
    assert found.low < found.high


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [not attacks.attack(rng.normal(size=80), rng.normal(size=120)).tells for _ in range(400)]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("few", [1, 3, 10, 30])
def test_a_few_examples_raise_no_more_false_alarms_than_many(few):
    rng = np.random.default_rng(0)
    told = [attacks.attack(rng.normal(size=few), rng.normal(size=500)).tells for _ in range(400)]
    assert np.mean(told) <= 0.075


def test_one_of_many_attacks_has_to_tell_more_before_all_raise_an_alarm():
    found = attacks.attack(np.arange(100.0), np.arange(100.0) + 10)
    assert found.tells
    assert not found.tells_among(20)


def test_true_positives_are_those_of_the_threshold_and_their_interval_holds_the_truth():
    # BUG: a hull around the curve was read, which is 2 % for 1 %, and no interval held it.
    pytest.importorskip("jax_privacy", reason="needs jax-privacy, of the extra `audit`")
    rng = np.random.default_rng(0)
    found = [attacks.canaries(rng.normal(size=200), rng.normal(size=1_600)) for _ in range(120)]
    assert np.mean([one.true_positives for one in found]) == pytest.approx(0.01, abs=0.003)
    assert np.mean([one.low <= 0.01 <= one.high for one in found]) > 0.8


def record(forgotten, scores, unseen):
    """What an audit has on a model that gets so many of 200 forgotten examples wrong, with these losses."""
    error = level_of(np.arange(200) < forgotten)._asdict()
    return {"errors": {"forgotten": error}, "attacks": {"forgotten": attacks.attack(scores, unseen)._asdict()}}


def test_a_retrained_model_excuses_no_trace_that_it_has_not_itself():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    told = {"unlearned": record(20, whole - 0.3, unseen), "rounding": {}, "rates": True}
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    verdict = lambda audited: _verdict.verdict(audited, reached, has_unseen=True)[0]
    assert verdict(told) == audit.FAILED
    assert verdict(told | {"retrained": record(20, whole, unseen)}) == audit.FAILED
    assert verdict(told | {"retrained": record(20, whole - 0.25, unseen)}) == audit.PASSED
    assert verdict(told | {"retrained": record(20, whole + 0.3, unseen)}) == audit.FAILED


def test_forgotten_examples_that_nothing_is_compared_with_are_said():
    # BUG: they were compared with unseen examples of other classes, or passed without a word.
    one = record(20, np.arange(200.0), np.arange(200.0)) | {"attacks": {}, "relearning": {}}
    audited = {"original": one | record(0, np.arange(200.0), 400 + np.arange(200.0)), "unlearned": one, "rates": True}
    (said,) = _verdict.remarks(audited, has_unseen=True, staying=200)
    assert said.startswith("Only 0 of 200 forgotten examples are compared: too few unseen")
    assert _verdict.remarks(audited, has_unseen=True, staying=0) == []
    assert _verdict.remarks(audited, has_unseen=False, staying=200) == []


def test_one_unseen_example_of_an_error_without_bounds_sets_no_aim():
    level = {"target": 0.3, "unseen": {"error": 0.3, "low": None}, "comparison": {"difference": 0.0}}
    assert _verdict.bounds(None, level, rates=False) == (pytest.approx(0.297), np.inf)


@pytest.mark.slow
def test_groups_are_those_of_the_positions_of_the_data(file):
    file.write_text(
        file.read_text()
        + "from eupmu_jax.tasks import Examples\n"
        + "rows = np.random.default_rng(0).permutation(300)[:200]\n"
        + "data, groups = Examples(data, rows), np.where(rows < 150, 0, 1)\n"
    )
    out = run(file, steps=2)
    found = audit.run(file, out)["classes"]["original"]
    own = user_file.load(file, deletion.NEEDED)
    kept, data = np.arange(30, 200), own["data"]
    for group in (0, 1):
        part = part_of(data, kept[(data.ids[kept] < 150) == (group == 0)])
        expected = levels.measured_level(own["task"], own["params"], part).error
        assert found[str(group)] == pytest.approx(expected)


def test_a_class_that_is_to_go_may_leave_a_straggler():
    reached = {"met": True, "level": {"kept": True, "target": 1.0, "unseen": None, "comparison": None}}
    for wrong, expected in ((200, audit.PASSED), (199, audit.PASSED), (180, audit.FAILED)):
        told = {"unlearned": record(wrong, np.arange(200.0), np.arange(200.0)), "rounding": {}, "rates": True}
        assert _verdict.verdict(told, reached, has_unseen=True)[0] == expected


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"level": {"kept": False}}, "The retain error is above its limit."),
        ({"met": False}, "The run missed its aim."),
        ({"rounding": 20}, "Rounding to 4 bits brings the forgotten back."),
        ({"rounding": 199}, None),
    ],
)
def test_a_limit_an_aim_and_a_rounding_decide_too(changed, reason):
    reached = {"met": True, "level": {"kept": True, "target": 1.0, "unseen": None, "comparison": None}}
    told = {"unlearned": record(200, np.arange(200.0), np.arange(200.0)), "rounding": {}, "rates": True}
    if "rounding" in changed:
        error = level_of(np.arange(200) < changed["rounding"])._asdict()
        told["rounding"] = {"8": told["unlearned"]["errors"], "4": {"forgotten": error}}
    reached |= {"met": changed.get("met", True), "level": reached["level"] | changed.get("level", {})}
    expected = (audit.FAILED, [reason]) if reason else (audit.PASSED, [])
    assert _verdict.verdict(told, reached, has_unseen=True) == expected


def of_earlier(scores, unseen, wrong=20):
    return {"earlier": [record(wrong, scores, unseen)], "rates": True}


def test_what_earlier_runs_forgot_is_attacked_too():
    # BUG: their error alone was judged.
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    earlier = [{"target": 0.1, "positions": []}]
    assert _verdict.known_again(of_earlier(whole, unseen), earlier) == []
    assert _verdict.known_again(of_earlier(whole, unseen, wrong=0), earlier) == [
        "What run 1 of those before forgot is known again."
    ]
    (said,) = _verdict.known_again(of_earlier(whole + 0.5, unseen), earlier)
    assert said.startswith("What run 1 of those before forgot can be told from data never seen: AUC 0.3")


def test_the_audit_measures_the_limit_itself():
    told = lambda error: {"unlearned": {"errors": {"retained": level_of(np.arange(1_000) < error)._asdict()}}}
    level = {"kept": True, "limit": 0.01}
    assert _verdict.above(told(15), level) == []
    assert _verdict.above(told(30), level) == ["The retain error is above its limit."]
    assert _verdict.above(told(30), level | {"kept": False}) == []
    assert _verdict.above(told(30), level | {"limit": None}) == []


def run(file, steps=60, ids=30, name="run", first=0, after=None):
    asked = deletion.Asked(steps=steps, forget_batch=16, retain_batch=48)
    own, positions = user_file.load(file, deletion.NEEDED), np.arange(first, ids)
    deletion.run(own, positions, file.parent / name, asked, "a command", after)
    return file.parent / name


def test_what_is_forgotten_passes_and_all_that_was_asked_is_in_the_record(file, eupmu, capsys):
    out = run(file)
    assert eupmu("audit", out, "mytask.py") == 0
    assert capsys.readouterr().out.endswith("Verdict: passed.\n")
    found = json.loads((out / "audit.json").read_text())
    assert found["reasons"] == []
    assert set(found["rounding"]) == {"8", "4"}
    assert set(found["classes"]) == {"original", "unlearned"}
    assert set(found["classes"]["unlearned"]) == set("0123456789")
    for model in ("original", "unlearned"):
        assert set(found[model]["attacks"]) == {"forgotten", "retained"}
        assert set(found[model]["errors"]) == {"forgotten", "retained", "unseen"}
        assert len(found[model]["relearning"]["on retained"]["step"]) == 5


@pytest.mark.slow
def test_few_examples_are_said_by_the_run_itself(file, eupmu, capsys):
    # BUG: a request of a few ids was "reached" with nothing forgotten, and only an audit said how little that means.
    sizes = ["--steps", "1", "--forget-batch", "16", "--retain-batch", "48"]
    for count, told in ((10, True), (150, False)):
        (file.parent / "ids.txt").write_text("\n".join(map(str, range(count))))
        eupmu("unlearn", "mytask.py", "--out", f"run{count}", *sizes)
        assert ("few, or were known too little, to tell" in capsys.readouterr().out) is told


def test_tests_that_the_untouched_model_passes_too_decide_nothing_where_nothing_changed(file, eupmu, capsys):
    # BUG: a run of one step, which moved nothing, passed with a remark.
    assert eupmu("audit", run(file, steps=1), "mytask.py") == 5
    said = capsys.readouterr().out
    assert "The original model passes the same tests" in said
    assert "Too few examples to tell: their error is not above what it was." in said
    assert eupmu("audit", run(file, steps=60, name="more"), "mytask.py") == 0
    assert "The original model passes the same tests" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_still_known_fails(file, eupmu, capsys):
    assert eupmu("audit", run(file, steps=1, ids=150), "mytask.py") == 4
    assert "The forgotten are still known: an error of 0.0" in capsys.readouterr().out


def test_with_nothing_to_compare_with_it_is_inconclusive(file, eupmu, capsys):
    file.write_text(file.read_text() + "held_out = None\n")
    assert eupmu("audit", run(file, steps=5), "mytask.py") == 5
    assert "neither held-out data nor a retrained model" in capsys.readouterr().out


@pytest.mark.parametrize("later", [True, False])
def test_unseen_data_that_came_or_went_since_the_run_make_no_record_untrue(later, file):
    # BUG: the level that the run never had, or had and could not be measured again, was called a false record.
    whole, without = file.read_text(), file.read_text() + "held_out = None\n"
    file.write_text(without if later else whole)
    out = run(file, steps=5)
    file.write_text(whole if later else without)
    assert not [reason for reason in audit.run(file, out)["reasons"] if "reached.json" in reason]
    reached = records.read(out / "reached.json", "reached")
    reached["level"]["forget_error"] += 0.2
    records.write(out / "reached.json", reached)
    assert [reason for reason in audit.run(file, out)["reasons"] if "reached.json" in reason]


def test_a_retrained_model_is_audited_beside(file):
    file.write_text(file.read_text() + "retrain = lambda positions: params if 149 not in positions else None\n")
    out = run(file, steps=1, ids=150)
    retraining.retrain(user_file.load(file, deletion.NEEDED), out)
    found = audit.run(file, out)
    assert found["retrained"]["errors"] == found["original"]["errors"]
    # The retrained one is as good on them, so there is nothing to find, not of the original either.
    # BUG: the untouched model passed beside it.
    assert found["verdict"] == audit.INCONCLUSIVE
    assert found["remarks"][0].startswith("The original model passes the same tests")
    assert found["remarks"][1] == "The retrained model is the original one: it tells nothing."


def test_a_class_that_one_bias_hides_is_told_by_its_losses():
    # BUG: attacks left out classes that are to go, and the audit passed beside an exact retrained model too.
    task, rng = tasks.classification(lambda params, x: x + params, num_classes=3), np.random.default_rng(0)

    def of(label, count, height):
        inputs = np.eye(3)[np.full(count, label)] * (height + rng.normal(size=(count, 1)))
        return as_examples("data", {"inputs": inputs.astype(np.float32), "labels": np.full(count, label, np.int32)})

    sides, unseen = {"forgotten": of(2, 100, 6), "retained": of(0, 100, 6)}, of(2, 100, 3)
    told, untold = (
        _measured.of_model(task, np.array([0.0, 0.0, -100.0]), sides | {"forgotten": part}, unseen, {2})
        for part in (sides["forgotten"], of(2, 100, 3))
    )
    assert told["errors"]["forgotten"]["error"] == 1
    assert told["attacks"][_measured.GONE]["auc"] > 0.9
    beside = lambda one, **others: {"unlearned": one, "rates": True} | others
    assert _verdict.traces(beside(told), "unlearned", 0.99, has_unseen=True) == []
    (said,) = _verdict.traces(beside(told, retrained=untold), "unlearned", 0.99, has_unseen=True)
    assert said.startswith(
        "An attack by the loss tells the forgotten from unseen examples of the classes to go: AUC 0.9"
    )
    assert _verdict.traces(beside(untold, retrained=untold), "unlearned", 0.99, has_unseen=True) == []


@pytest.mark.slow
def test_more_forgotten_than_a_retrained_model_lacks_fails(file):
    file.write_text(file.read_text() + "held_out, retrain = None, lambda positions: params\n")
    out = run(file, ids=150)
    retraining.retrain(user_file.load(file, deletion.NEEDED), out)
    found = audit.run(file, out)
    assert found["verdict"] == audit.FAILED
    assert "Too much is forgotten" in found["reasons"][-1]


@pytest.mark.slow
def test_shadow_models_tell_of_each_example_what_the_attack_on_all_does_not(file, eupmu, capsys):
    shadows = """
halves = [np.random.default_rng(n).permutation(300)[:150] for n in range(6)]
shadows = [(level.trained(ids[half], n), half) for n, half in enumerate(halves)]
"""
    file.write_text(file.read_text() + shadows)
    out = run(file, steps=1, ids=100)
    assert eupmu("audit", out, "mytask.py") == 4
    found = json.loads((out / "audit.json").read_text())
    assert found["original"]["lira"]["low"] > found["original"]["attacks"]["forgotten"]["auc"]
    assert "An attack with shadow models tells the forgotten" in capsys.readouterr().out


@pytest.mark.slow
def test_held_out_examples_that_the_model_learned_decide_nothing(file, eupmu, capsys):
    # BUG: nothing was forgotten, the aim reached, the audit passed, and the report found no trace.
    before = file.read_text()
    file.write_text(f"{before}held_out = data\n")
    assert eupmu("audit", run(file, steps=1), "mytask.py") == 5
    assert "300 of 300 held-out examples are, or equal, some of the data: they are not" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("shadows = 5", "shadows: got int, expected a list of pairs of parameters and the positions"),
        ("shadows = np.zeros(3)", "shadows: got float64 as number 0, expected a list of pairs"),
        ("shadows = [(params, [])]", "shadows: got no positions as number 0, expected a list of pairs"),
        ("shadows = iter([({}, [1])])", "shadows, number 0: got no leaf ["),
        ("groups = [None] * 150 + ['b'] * 150", "groups: got None for example 0, expected a group for each"),
        ("groups = np.where(np.arange(300) == 7, np.nan, 1.0)", "groups: got nan for example 7, expected a group"),
    ],
)
def test_what_no_shadow_model_and_no_group_is_is_named(file, lines, message):
    # BUG: these ended in errors of Python and NumPy.
    file.write_text(file.read_text() + lines + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        audit.make(file, run(file, steps=2))


@pytest.mark.slow
def test_errors_are_by_the_groups_that_the_file_names(file, tmp_path):
    before = file.read_text()
    file.write_text(f"{before}groups = np.where(np.arange(300) % 2 == 0, 'clinic <A>', 'clinic <B>')\n")
    out = run(file, steps=2)
    assert set(audit.run(file, out)["classes"]["unlearned"]) == {"clinic <A>", "clinic <B>"}
    page.run(out)
    assert "<th>clinic &lt;A&gt;</th>" in (out / "report.html").read_text()
    file.write_text(f"{before}groups = [1, 2]\n")
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\), expected \(300,\)"):
        audit.run(file, out)


@pytest.mark.slow
def test_what_an_earlier_run_forgot_is_audited_again(file):
    first = run(file, name="first")
    second = run(file, name="second", first=30, ids=50, after=first)
    found = audit.run(file, second)
    assert found["verdict"] == audit.PASSED
    (earlier,) = found["earlier"]
    assert earlier["errors"]["forgotten"]["examples"] == 30
    page.run(second)
    assert "<th>run 1, 30 examples</th>" in (second / "report.html").read_text()
    # This run began where that one ended.
    assert found["original"]["errors"]["unseen"] == audit.run(file, first)["unlearned"]["errors"]["unseen"]
    # As if far more had been forgotten then.
    asked, own = records.read(second / "asked.json", "asked"), user_file.load(file, deletion.NEEDED)
    with np.load("params.npz") as saved:
        params, _ = checkpoints.load(second / "params", dict(saved), {})
    asked["earlier"][0]["target"] = 0.9
    records.write(second / "asked.json", asked)
    checkpoints.save(second / "params", params, {"asked": asked})
    assert records.read(second / "reached.json", "reached")["returned"] == []
    again = audit.run(file, second)
    assert again["verdict"] == audit.FAILED
    data = as_examples("data", own["data"])
    assert _judged.returned(own["task"], params, data, asked["earlier"]) == [1]
    assert again["reasons"] == ["What run 1 of those before forgot is known again."]


def other_parameters(out):
    with np.load("params.npz") as saved:
        checkpoints.save(out / "params", dict(saved), {"asked": records.read(out / "asked.json", "asked")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, out: f.write_text(f.read_text() + "data['labels'][0] += 1\n"), "has other data or parameters than"),
        (
            lambda f, out: (out / "reached.json").unlink(),
            "reached.json is not there; expected the folder of a finished",
        ),
        (lambda f, out: (out / "asked.json").write_text("{"), "asked.json is damaged"),
        (
            lambda f, out: f.write_text(f.read_text() + "held_out['labels'][0] += 1\n"),
            "^held_out: .* has others than the run in .* took its level from",
        ),
        (lambda f, out: other_parameters(out), "^out: .* has other parameters than the run ended with"),
        (lambda f, out: (out / "params" / "1" / "params" / "manifest.ocdbt").write_bytes(b""), "that cannot be read"),
    ],
)
def test_other_data_and_damage_are_named(change, message, file):
    out = run(file, steps=2)
    change(file, out)
    with pytest.raises(ValueError, match=message):
        audit.run(file, out)
    assert not (out / "audit.json").exists()


def test_a_loss_that_is_no_number_is_that_of_a_model_that_knows_nothing():
    assert attacks.attack(np.full(3, np.nan), np.arange(4.0)).auc == 0.0
    assert attacks.attack(np.arange(4.0), np.full(3, np.nan)).auc == 1.0


def test_positions_of_shadow_models_lie_in_the_data():
    params = np.zeros(1)
    ((_, seen),) = attacks.checked_shadows([(params, [0, 2])], 3, params)
    assert seen.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="shadows: got positions of number 0 outside of the data"):
        attacks.checked_shadows([(params, [0, 3])], 3, params)


def test_more_errors_than_a_retrained_model_has_fail_where_they_are_beyond_noise():
    whole = np.arange(200.0)
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    for wrong, expected in ((32, audit.PASSED), (60, audit.FAILED)):
        told = {name: record(count, whole, whole) for name, count in (("unlearned", wrong), ("retrained", 20))}
        assert _verdict.verdict(told | {"rounding": {}, "rates": True}, reached, has_unseen=True)[0] == expected


@pytest.mark.parametrize(("target", "wrong", "rounded"), [(0.5, 90, 80), (0.1, 100, 40)])
def test_rounding_brings_nothing_back_where_the_error_stays_within_noise_or_at_the_aim(target, wrong, rounded):
    reached = {"met": True, "level": {"kept": True, "target": target, "unseen": None, "comparison": None}}
    told = {"unlearned": record(wrong, np.arange(200.0), np.arange(200.0)), "rates": True}
    told["rounding"] = {"4": {"forgotten": level_of(np.arange(200) < rounded)._asdict()}}
    assert _verdict.verdict(told, reached, has_unseen=True) == (audit.PASSED, [])


def test_one_of_many_earlier_runs_has_to_tell_more_than_one_alone():
    told = {"earlier": [record(20, np.arange(100.0), np.arange(100.0) + 10)] * 20, "rates": True}
    run = {"target": 0.1, "positions": []}
    assert _verdict.known_again(told, [run] * 20) == []
    assert len(_verdict.known_again(told | {"earlier": told["earlier"][:1]}, [run])) == 1


def test_of_more_examples_than_are_compared_at_most_none_are_said_to_be_left_out():
    one = record(20, np.arange(200.0), np.arange(200.0))
    one["attacks"]["forgotten"]["examples"] = (2_000, 300)
    audited = {"unlearned": one | {"relearning": {}}, "rates": True}
    assert _verdict.remarks(audited, has_unseen=True, staying=10_000) == []


@pytest.mark.parametrize(("low", "least"), [(0.2, 0.2), (0.295, 0.29)])
def test_an_aim_is_no_better_known_than_the_unseen_data_it_was_measured_on(low, least):
    level = {"target": 0.3, "interval": [low, 0.4], "comparison": {"difference": 0.0}}
    assert _verdict.bounds(None, level, rates=True) == (pytest.approx(least), np.inf)


def test_what_does_not_tell_of_a_retrained_model_excuses_nothing_near_it():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    models = {"unlearned": record(20, whole - 0.2, unseen), "retrained": record(20, whole - 0.1, unseen)}
    told = models | {"rounding": {}, "rates": True}
    assert _verdict.verdict(told, reached, has_unseen=True)[0] == audit.FAILED


# The model says class 0 of all, and a figure is its own error.
GUESS = tasks.classification(lambda params, inputs: jax.nn.one_hot(jnp.zeros(len(inputs), int), 3), num_classes=3)
FIGURE = tasks.Task(
    outputs=lambda params, batch, key: params * batch["x"],
    retain=lambda outputs, batch: jnp.mean(outputs),
    forget={"ascent": lambda outputs, batch: -jnp.mean(outputs)},
    error=lambda outputs, batch: outputs,
)
classes = lambda *labels: as_examples("set", {"inputs": np.zeros((len(labels), 1)), "labels": np.array(labels)})
figures = lambda *values: as_examples("set", {"x": np.array(values, np.float32)})


def reached(target, forget_error, comparison=None):
    return Reached(target, "settings", None, forget_error, 0.0, 0.0, np.inf, True, comparison)


def test_no_level_is_reached_where_none_is_known():
    sets = figures(5.0, 5.0), figures(1.0)
    assert _judged.judged({"task": FIGURE}, 1.0, 1.0, reached(UNLIMITED, 5.0), sets)[0] is False


def test_an_error_that_is_no_rate_may_be_short_by_a_hundredth_of_its_way():
    sets = figures(1.0, 1.0), figures(1.0)
    met = lambda error: _judged.judged({"task": FIGURE}, 1.0, 1.0, reached(5.0, error), sets)[0]
    assert (met(4.97), met(4.95)) == (True, False)
    again = lambda error: _judged.returned(FIGURE, 1.0, figures(error, error), [{"positions": [0, 1], "target": 5.0}])
    assert (again(4.97), again(4.9)) == ([], [1])


def test_what_is_within_noise_of_its_target_is_not_known_again():
    data = classes(*[1] * 8, 0, 0)
    earlier = [{"positions": list(range(10)), "target": 0.9}, {"positions": [8, 9] * 20, "target": 0.9}]
    assert _judged.returned(GUESS, 1.0, data, earlier) == [2]


def test_a_class_that_is_to_go_counts_beside_a_comparison_of_the_others():
    alike, own = levels.Comparison(0.0, -0.1, 0.1, 1.0), {"task": GUESS, "held_out": classes(*[0, 1] * 10).tree}
    known, lost = (classes(*[0] * 10, *[c] * 30) for c in (0, 2))
    retain = classes(0, 1)
    # Class 2 is to go, and is: the model says 0 for all. It tells nothing of class 0, but did know class 2.
    assert _judged.judged(own, 1.0, 1.0, reached(0.7, 0.75, alike), (lost, retain)) == (True, True)
    assert _judged.judged(own, 1.0, 1.0, reached(1.0, 0.75, alike), (lost, retain)) == (False, True)
    # Without it, what the original model cannot tell decides nothing.
    assert _judged.judged(own, 1.0, 1.0, reached(0.0, 0.0, alike), (known, retain)) == (True, False)


def test_scores_far_from_the_unseen_ones_on_both_sides_raise_no_more_false_alarms():
    # BUG: of a mixture with an area of 0.5, one in five samples was told from the unseen.
    rng = np.random.default_rng(0)
    drawn = [(3 * rng.choice([-1, 1], 30) + rng.normal(size=30), rng.normal(size=700)) for _ in range(300)]
    assert np.mean([attacks.attack(*pair).tells for pair in drawn]) < 0.09


def test_two_attacks_raise_no_more_false_alarms_than_one():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    one = record(20, whole - 0.17, unseen)
    told = lambda model: _verdict.traces({"unlearned": model, "rates": True}, "unlearned", 0.0, has_unseen=True)
    assert len(told(one)) == 1
    assert told(one | {"lira": one["attacks"]["forgotten"]}) == []
