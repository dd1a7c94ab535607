"""Trials are the same points for every method and after a stop, and scored without the retrained model."""

import collections
import math

import optuna
import pytest

from eupmu_jax.benchmark import tuning
from eupmu_jax.methods import METHODS, Choice, LogUniform


@pytest.fixture
def storage(tmp_path):
    tuning.create(tmp_path / "tuning.db")
    return tmp_path / "tuning.db"


@pytest.mark.parametrize("name", ["SalUn", "EUPMU budget"])
def test_settings_lie_in_the_space_and_cover_it_evenly(storage, name):
    method = METHODS[name]
    study = tuning.Study(storage, f"design/{name}", method)
    drawn = [study.settings(index) for index in range(8)]
    study.tell(0, drawn[0], 1.0)
    assert [tuning.Study(storage, f"design/{name}", method).settings(index) for index in range(8)] == drawn
    for field, dimension in method.space.items():
        values = [settings[field] for settings in drawn]
        if isinstance(dimension, Choice):
            assert set(values) == set(dimension.options)
        else:
            shares = [math.log(value / dimension.low) / math.log(dimension.high / dimension.low) for value in values]
            assert sorted(int(8 * share) for share in shares) == list(range(8))


def test_methods_have_the_same_points():
    first, second = METHODS["weighted sum"], METHODS["EUPMU budget"]
    for index in range(8):
        position = tuning.point(index, 3)
        one, other = tuning.settings_at(first, position), tuning.settings_at(second, position)
        assert one["learning_rate"] == other["learning_rate"]
        assert one["forget_objective"] == other["forget_objective"]
    assert len({tuning.settings_at(first, tuning.point(index, 3))["learning_rate"] for index in range(8)}) == 8


def test_a_study_keeps_every_trial_once(storage):
    method = METHODS["SalUn"]
    study = tuning.Study(storage, "a", method)
    for index in (0, 1, 0):
        study.tell(index, study.settings(index), float(index))
    again = tuning.Study(storage, "a", method)
    again.tell(1, again.settings(1), 1.0)
    again.tell(2, again.settings(2), tuning.DIVERGED)
    kept = optuna.load_study(study_name="a", storage=f"sqlite:///{storage}")
    assert [trial.value for trial in kept.trials] == [0.0, 1.0, tuning.DIVERGED]
    assert [trial.params for trial in kept.trials] == [again.settings(index) for index in range(3)]
    assert kept.best_trial.user_attrs == {"index": 0}


def test_the_blind_score_by_hand():
    original = {"UA": 0.0, "RA": 100.0, "TA": 91.0}
    assert tuning.blind_score({"UA": 6.0, "RA": 98.0, "TA": 90.0}, original) == pytest.approx((3 + 2 + 1) / 3)
    of_a_class = {"UA": 97.0, "RA": 98.0, "TA": 90.0, "test_UA": 95.0}
    assert tuning.blind_score(of_a_class, original) == pytest.approx((3 + 2 + 1) / 3)


def test_the_best_trial_is_the_first_of_the_lowest():
    rows = [
        {"kind": "trial", "trial": t, "blind": b, "gap": g} for t, b, g in ((1, 2.0, 5.0), (0, 2.0, 6.0), (2, 3.0, 1.0))
    ]
    assert [row["trial"] for row in tuning.trials_of([*rows, {"kind": "run", "trial": 7}], {"kind": "trial"})] == [
        0,
        1,
        2,
    ]
    assert (tuning.best(rows, "blind"), tuning.best(rows, "gap")) == (0, 2)


def test_every_method_is_searched_in_as_many_dimensions_over_as_wide_a_range_of_learning_rates():
    assert {len(method.space) for method in METHODS.values()} == {3}
    widths = collections.Counter()
    for method in METHODS.values():
        rate = method.space["learning_rate"]
        assert isinstance(rate, LogUniform)
        widths[round(math.log10(rate.high / rate.low), 1)] += 1
    assert set(widths) == {1.5}
