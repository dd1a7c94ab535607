"""How the figures of an audit and of a run determine the verdict, the remarks, and whether an aim was met."""

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

# The classifier always predicts class 0; in the other task, the error of an example is its own value.
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
    """The audit's record of a model that gets `forgotten` of 200 forgotten examples wrong, with these losses."""
    error = level_of(np.arange(200) < forgotten)._asdict()
    return {"errors": {"forgotten": error}, "attacks": {"forgotten": attacks.attack(scores, unseen)._asdict()}}


def of_earlier(scores, unseen, wrong=20):
    return {"earlier": [record(wrong, scores, unseen)], "rates": True}


def reached(target, forget_error, comparison=None):
    return Reached(target, "settings", None, forget_error, 0.0, 0.0, np.inf, True, comparison)


def test_a_retrained_model_excuses_only_traces_that_it_shows_itself():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    told = {"unlearned": record(20, whole - 0.3, unseen), "rounding": {}, "rates": True}
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    verdict = lambda audited: _verdict.verdict(audited, reached, has_unseen=True)[0]
    assert verdict(told) == audit.FAILED
    assert verdict(told | {"retrained": record(20, whole, unseen)}) == audit.FAILED
    assert verdict(told | {"retrained": record(20, whole - 0.25, unseen)}) == audit.PASSED
    assert verdict(told | {"retrained": record(20, whole + 0.3, unseen)}) == audit.FAILED


def test_forgotten_examples_without_a_comparison_are_remarked_on():
    # BUG: they were compared with unseen examples of other classes, or passed silently.
    one = record(20, np.arange(200.0), np.arange(200.0)) | {"attacks": {}, "relearning": {}}
    audited = {"original": one | record(0, np.arange(200.0), 400 + np.arange(200.0)), "unlearned": one, "rates": True}
    (said,) = _verdict.remarks(audited, has_unseen=True, staying=200)
    assert said.startswith("Only 0 of 200 forgotten examples are compared: there are too few unseen")
    assert _verdict.remarks(audited, has_unseen=True, staying=0) == []
    assert _verdict.remarks(audited, has_unseen=False, staying=200) == []


def test_one_unseen_example_does_not_bound_the_aim_of_an_error_that_is_not_a_rate():
    level = {"target": 0.3, "unseen": {"error": 0.3, "low": None}, "comparison": {"difference": 0.0}}
    assert _verdict.bounds(None, level, rates=False) == (pytest.approx(0.297), np.inf)


def test_a_class_to_be_forgotten_may_leave_one_example_recognised():
    reached = {"met": True, "level": {"kept": True, "target": 1.0, "unseen": None, "comparison": None}}
    for wrong, expected in ((200, audit.PASSED), (199, audit.PASSED), (180, audit.FAILED)):
        told = {"unlearned": record(wrong, np.arange(200.0), np.arange(200.0)), "rounding": {}, "rates": True}
        assert _verdict.verdict(told, reached, has_unseen=True)[0] == expected


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"level": {"kept": False}}, "The retain error is above its limit."),
        ({"met": False}, "The run missed its target."),
        ({"rounding": 20}, "Rounding to 4 bits brings the forgotten examples back."),
        ({"rounding": 199}, None),
    ],
)
def test_the_limit_the_aim_and_rounding_decide_too(changed, reason):
    reached = {"met": True, "level": {"kept": True, "target": 1.0, "unseen": None, "comparison": None}}
    told = {"unlearned": record(200, np.arange(200.0), np.arange(200.0)), "rounding": {}, "rates": True}
    if "rounding" in changed:
        error = level_of(np.arange(200) < changed["rounding"])._asdict()
        told["rounding"] = {"8": told["unlearned"]["errors"], "4": {"forgotten": error}}
    reached |= {"met": changed.get("met", True), "level": reached["level"] | changed.get("level", {})}
    expected = (audit.FAILED, [reason]) if reason else (audit.PASSED, [])
    assert _verdict.verdict(told, reached, has_unseen=True) == expected


def test_forget_sets_of_earlier_runs_are_attacked_too():
    # BUG: only their error was judged.
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    earlier = [{"target": 0.1, "positions": []}]
    assert _verdict.known_again(of_earlier(whole, unseen), earlier) == []
    assert _verdict.known_again(of_earlier(whole, unseen, wrong=0), earlier) == [
        "What earlier run 1 forgot is known again."
    ]
    (said,) = _verdict.known_again(of_earlier(whole + 0.5, unseen), earlier)
    assert said.startswith("What earlier run 1 forgot can be distinguished from unseen data: AUC 0.3")


def test_the_audit_measures_the_limit_itself():
    told = lambda error: {"unlearned": {"errors": {"retained": level_of(np.arange(1_000) < error)._asdict()}}}
    level = {"kept": True, "limit": 0.01}
    assert _verdict.above(told(15), level) == []
    assert _verdict.above(told(30), level) == ["The retain error is above its limit."]
    assert _verdict.above(told(30), level | {"kept": False}) == []
    assert _verdict.above(told(30), level | {"limit": None}) == []


def test_a_class_that_a_single_bias_hides_is_detected_by_its_losses():
    # BUG: attacks left out classes to be forgotten, so the audit passed even in comparison with a retrained model.
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
        "An attack by the loss distinguishes forgotten from unseen examples of the classes to be forgotten: AUC 0.9"
    )
    assert _verdict.traces(beside(untold, retrained=untold), "unlearned", 0.99, has_unseen=True) == []


def test_more_errors_than_a_retrained_model_fail_only_beyond_noise():
    whole = np.arange(200.0)
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    for wrong, expected in ((32, audit.PASSED), (60, audit.FAILED)):
        told = {name: record(count, whole, whole) for name, count in (("unlearned", wrong), ("retrained", 20))}
        assert _verdict.verdict(told | {"rounding": {}, "rates": True}, reached, has_unseen=True)[0] == expected


@pytest.mark.parametrize(("target", "wrong", "rounded"), [(0.5, 90, 80), (0.1, 100, 40)])
def test_rounding_does_not_fail_an_error_that_stays_within_noise_or_at_the_aim(target, wrong, rounded):
    reached = {"met": True, "level": {"kept": True, "target": target, "unseen": None, "comparison": None}}
    told = {"unlearned": record(wrong, np.arange(200.0), np.arange(200.0)), "rates": True}
    told["rounding"] = {"4": {"forgotten": level_of(np.arange(200) < rounded)._asdict()}}
    assert _verdict.verdict(told, reached, has_unseen=True) == (audit.PASSED, [])


def test_one_of_many_earlier_runs_needs_stronger_evidence_than_a_single_one():
    told = {"earlier": [record(20, np.arange(100.0), np.arange(100.0) + 10)] * 20, "rates": True}
    run = {"target": 0.1, "positions": []}
    assert _verdict.known_again(told, [run] * 20) == []
    assert len(_verdict.known_again(told | {"earlier": told["earlier"][:1]}, [run])) == 1


def test_sampling_a_large_set_is_not_remarked_on_as_leaving_examples_out():
    one = record(20, np.arange(200.0), np.arange(200.0))
    one["attacks"]["forgotten"]["examples"] = (2_000, 300)
    audited = {"unlearned": one | {"relearning": {}}, "rates": True}
    assert _verdict.remarks(audited, has_unseen=True, staying=10_000) == []


@pytest.mark.parametrize(("low", "least"), [(0.2, 0.2), (0.295, 0.29)])
def test_the_lower_bound_of_an_aim_follows_the_interval_of_the_unseen_data(low, least):
    level = {"target": 0.3, "interval": [low, 0.4], "comparison": {"difference": 0.0}}
    assert _verdict.bounds(None, level, rates=True) == (pytest.approx(least), np.inf)


def test_an_insignificant_trace_of_a_retrained_model_excuses_no_larger_one():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    reached = {"met": True, "level": {"kept": True, "target": 0.1, "unseen": None, "comparison": None}}
    models = {"unlearned": record(20, whole - 0.2, unseen), "retrained": record(20, whole - 0.1, unseen)}
    told = models | {"rounding": {}, "rates": True}
    assert _verdict.verdict(told, reached, has_unseen=True)[0] == audit.FAILED


def test_no_level_counts_as_reached_where_none_is_known():
    sets = figures(5.0, 5.0), figures(1.0)
    assert _judged.judged({"task": FIGURE}, 1.0, 1.0, reached(UNLIMITED, 5.0), sets)[0] is False


def test_an_error_that_is_not_a_number_reaches_no_target():
    # BUG: without unseen data to compare with, the target counted as reached.
    sets = figures(5.0, np.nan), figures(1.0)
    assert _judged.judged({"task": FIGURE}, 1.0, 1.0, reached(5.0, np.nan), sets)[0] is False


def test_an_error_that_is_not_a_rate_may_fall_short_by_a_hundredth_of_the_distance():
    sets = figures(1.0, 1.0), figures(1.0)
    met = lambda error: _judged.judged({"task": FIGURE}, 1.0, 1.0, reached(5.0, error), sets)[0]
    assert (met(4.97), met(4.95)) == (True, False)
    again = lambda error: _judged.returned(FIGURE, 1.0, figures(error, error), [{"positions": [0, 1], "target": 5.0}])
    assert (again(4.97), again(4.9)) == ([], [1])


@pytest.mark.parametrize(
    ("spread", "short", "met"),
    [(0.0, 0.03, True), (0.0, 0.05, False), (0.5, 0.09, True), (0.5, 0.11, False), (9.0, 0.3, True), (9.0, 0.5, False)],
)
def test_a_condition_is_forgotten_up_to_the_noise_of_its_errors_beside_those_without_it(spread, short, met):
    # BUG: runs of a diffusion model that ended at their target passed or failed by luck.
    unknown = 5 + np.tile([-4.0, 4.0], 50)
    apart = spread * np.repeat([-1.0, 1.0], 50) - short
    task = FIGURE._replace(unknown=lambda params, batch: (batch["x"] - batch["apart"], 1))
    sets = as_examples("set", {"x": unknown + apart, "apart": apart}), figures(1.0)
    level = reached(5.0, float(np.mean(unknown + apart)))._replace(source="unknown")
    noisy = _judged.least_of_noise(task, 0.2, 1.0, level, sets[0])
    assert _judged.judged({"task": task}, 0.2, 1.0, level, sets, noisy)[0] is met
    # Records of before, and targets from elsewhere, have no such figure.
    assert _judged.judged({"task": task}, 0.2, 1.0, level, sets)[0] is (short < 0.04)
    assert _judged.least_of_noise(task, 0.2, 1.0, level._replace(source="settings"), sets[0]) is None


@pytest.mark.parametrize(("count", "wrong"), [(600, 378), (60, 36)])
def test_chance_is_reached_up_to_the_noise_of_as_many_guesses(count, wrong):
    # BUG: of models that guess among three classes, over a third were said to have missed the error of chance.
    task = tasks.classification(lambda params, inputs: jax.nn.one_hot(params * inputs[:, 0], 3), num_classes=3)

    def met(wrong, noisy=True):
        labels = np.repeat([1, 0], [wrong, count - wrong])
        sets = as_examples("set", {"inputs": labels[:, None], "labels": labels}), classes(0)
        level = reached(2 / 3, wrong / count)._replace(source="chance")
        least = _judged.least_of_noise(task, 1, 0, level, sets[0]) if noisy else None
        assert _judged.least_of_noise(task, 1, 0, level._replace(target=1.0), sets[0]) is None
        return _judged.judged({"task": task}, 1, 0, level, sets, least)[0]

    assert (met(wrong), met(wrong - 1), met(wrong, noisy=False)) == (True, False, False)


def test_a_set_within_noise_of_its_target_is_not_known_again():
    data = classes(*[1] * 8, 0, 0)
    earlier = [{"positions": list(range(10)), "target": 0.9}, {"positions": [8, 9] * 20, "target": 0.9}]
    assert _judged.returned(GUESS, 1.0, data, earlier) == [2]


def test_a_class_to_be_forgotten_counts_in_addition_to_the_comparison_of_the_others():
    alike, own = levels.Comparison(0.0, -0.1, 0.1, 1.0), {"task": GUESS, "held_out": classes(*[0, 1] * 10).tree}
    known, lost = (classes(*[0] * 10, *[c] * 30) for c in (0, 2))
    retain = classes(0, 1)
    # Class 2 is forgotten entirely, since the model always predicts class 0.
    assert _judged.judged(own, 1.0, 1.0, reached(0.7, 0.75, alike), (lost, retain)) == (True, True)
    assert _judged.judged(own, 1.0, 1.0, reached(1.0, 0.75, alike), (lost, retain)) == (False, True)
    # Without such a class, nothing can be told, since the original model is like unseen data too.
    assert _judged.judged(own, 1.0, 1.0, reached(0.0, 0.0, alike), (known, retain)) == (True, False)


def test_two_attacks_raise_no_more_false_alarms_than_one():
    unseen, whole = (stats.norm.ppf((np.arange(n) + 0.5) / n) for n in (1000, 200))
    one = record(20, whole - 0.17, unseen)
    told = lambda model: _verdict.traces({"unlearned": model, "rates": True}, "unlearned", 0.0, has_unseen=True)
    assert len(told(one)) == 1
    assert told(one | {"lira": one["attacks"]["forgotten"]}) == []


def test_the_aims_of_earlier_runs_are_only_as_certain_as_the_unseen_data_they_were_measured_on():
    # BUG: with 40 held-out digits, one in twenty exactly retrained models was said to know the forget set again.
    told = of_earlier(np.arange(200.0), np.arange(200.0), wrong=20)
    run = {"positions": [], "target": 0.3}
    assert len(_verdict.known_again(told, [run])) == 1
    assert _verdict.known_again(told, [run | {"interval": [0.1, 0.5]}]) == []
    data = classes(*[1] * 2, *[0] * 18)
    (again,) = [{"positions": list(range(20)), "target": 0.5}]
    assert _judged.returned(GUESS, 1.0, data, [again]) == [1]
    assert _judged.returned(GUESS, 1.0, data, [again | {"interval": [0.2, 0.8]}]) == []
