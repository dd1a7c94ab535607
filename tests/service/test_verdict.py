"""What the figures of an audit and of a run decide: verdict, remarks, and whether an aim was met."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from eupmu_jax import tasks
from eupmu_jax.methods.eupmu_level import UNLIMITED
from eupmu_jax.service import _judged, _measured, _verdict, attacks, audit
from eupmu_jax.tasks import as_examples
from eupmu_jax.training import levels
from eupmu_jax.training._reached import Reached
from eupmu_jax.training.levels import level_of

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


def record(forgotten, scores, unseen):
    """What an audit has on a model that gets so many of 200 forgotten examples wrong, with these losses."""
    error = level_of(np.arange(200) < forgotten)._asdict()
    return {"errors": {"forgotten": error}, "attacks": {"forgotten": attacks.attack(scores, unseen)._asdict()}}


def of_earlier(scores, unseen, wrong=20):
    return {"earlier": [record(wrong, scores, unseen)], "rates": True}


def reached(target, forget_error, comparison=None):
    return Reached(target, "settings", None, forget_error, 0.0, 0.0, np.inf, True, comparison)


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


def test_two_attacks_raise_no_more_false_alarms_than_one():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    one = record(20, whole - 0.17, unseen)
    told = lambda model: _verdict.traces({"unlearned": model, "rates": True}, "unlearned", 0.0, has_unseen=True)
    assert len(told(one)) == 1
    assert told(one | {"lira": one["attacks"]["forgotten"]}) == []


def test_what_earlier_runs_aimed_at_is_no_better_known_than_the_unseen_data_it_was_measured_on():
    # BUG: of exact retrained models beside 40 held-out digits, one in twenty was told to know them again.
    told = of_earlier(np.arange(200.0), np.arange(200.0), wrong=20)
    run = {"positions": [], "target": 0.3}
    assert len(_verdict.known_again(told, [run])) == 1
    assert _verdict.known_again(told, [run | {"interval": [0.1, 0.5]}]) == []
    data = classes(*[1] * 2, *[0] * 18)
    (again,) = [{"positions": list(range(20)), "target": 0.5}]
    assert _judged.returned(GUESS, 1.0, data, [again]) == [1]
    assert _judged.returned(GUESS, 1.0, data, [again | {"interval": [0.2, 0.8]}]) == []
