"""Trials use the same points for every method, match the saved rows, and are scored without a retrained model."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.benchmark import designs, rows, saved, tuning
from eupmu_jax.methods import METHODS, Choice, LogUniform, Method

ROWS = Path(__file__).parents[2] / "experiments" / "classification" / "rows.jsonl"


@pytest.fixture(scope="module")
def trials():
    return rows.select(saved.read(ROWS), kind="trial")


@pytest.mark.parametrize("name", METHODS)
def test_saved_trials_have_the_settings_of_their_index(name, trials):
    mine = rows.select(trials, method=name)
    expected = {index: tuning.settings(METHODS[name], index) for index in {row["trial"] for row in mine}}
    tried = {row["design"] for row in mine}
    assert set(expected) == set(range(max((designs.design(design).trials for design in tried), default=0)))
    assert [row["settings"] for row in mine] == [expected[row["trial"]] for row in mine]


def test_the_sequence_of_points_covers_every_coordinate_evenly():
    points = np.stack([tuning.point(index, 3) for index in range(16)])
    assert len(np.unique(points, axis=0)) == 16
    for count in (2, 4, 8, 16):
        cells = np.sort(np.floor(points[:count] * count), axis=0)
        np.testing.assert_array_equal(cells, np.arange(count)[:, None] * np.ones(3))


@pytest.mark.parametrize("name", ["SalUn", "EUPMU budget"])
def test_settings_lie_in_the_space_and_cover_it_evenly(name):
    drawn = [tuning.settings(METHODS[name], index) for index in range(8)]
    for field, dimension in METHODS[name].space.items():
        values = [settings[field] for settings in drawn]
        if isinstance(dimension, Choice):
            assert set(values) == set(dimension.options)
        else:
            shares = [math.log(value / dimension.low) / math.log(dimension.high / dimension.low) for value in values]
            assert sorted(int(8 * share) for share in shares) == list(range(8))


def rate_of(method):
    """The learning rate, or the length of the path: the learning rate times the steps."""
    return "learning_rate" if "learning_rate" in method.space else "length"


@pytest.mark.parametrize("index", range(8))
def test_every_method_has_the_same_points(index):
    positions = {}
    for name, method in METHODS.items():
        settings = tuning.settings(method, index)
        assert list(settings) == list(method.space)
        field = rate_of(method)
        rate = method.space[field]
        positions[name] = math.log(settings[field] / rate.low) / math.log(rate.high / rate.low)
    # Settings are rounded to three digits, a small fraction of their range.
    np.testing.assert_allclose(list(positions.values()), tuning.point(index, 3)[0], atol=2e-3)


@pytest.mark.parametrize("index", range(8))
def test_methods_that_share_a_dimension_try_the_same_values_of_it(index):
    one, other = (tuning.settings(METHODS[name], index) for name in ("weighted sum", "EUPMU budget"))
    assert one["learning_rate"] == other["learning_rate"]
    assert one["forget_objective"] == other["forget_objective"]


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2))
def test_a_position_gives_settings_between_the_ends(position):
    space = {"rate": LogUniform(1e-4, 1e-2), "loss": Choice(("a", "b", "c"))}
    method = Method(lambda *_: None, "", "", "", space)
    found = tuning.settings_at(method, np.array(position))
    assert 1e-4 <= found["rate"] <= 1e-2
    assert found["rate"] == pytest.approx(1e-4 * 100 ** position[0], rel=5e-3)
    assert found["loss"] == "abc"[int(3 * position[1])]


def test_a_position_with_the_wrong_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tuning.settings_at(METHODS["SalUn"], np.array([0.5, 0.5]))


def test_every_method_has_as_many_dimensions_and_as_wide_a_range_of_learning_rates():
    assert {len(method.space) for method in METHODS.values()} == {3}
    rates = [method.space[rate_of(method)] for method in METHODS.values()]
    assert all(isinstance(rate, LogUniform) for rate in rates)
    wide = {name: round(math.log10(rate.high / rate.low), 1) for name, rate in zip(METHODS, rates, strict=True)}
    assert {name: width for name, width in wide.items() if width != 1.5} == {}


@pytest.mark.parametrize("known", ["VA", "TA"])
def test_the_blind_score_by_hand(known):
    original = {"UA": 0.0, "RA": 100.0, known: 91.0}
    assert tuning.blind_score({"UA": 6.0, "RA": 98.0, known: 90.0}, original) == pytest.approx((3 + 2 + 1) / 3)
    of_a_class = {"UA": 97.0, "RA": 98.0, known: 90.0, "test_UA": 95.0}
    assert tuning.blind_score(of_a_class, original) == pytest.approx((3 + 2 + 1) / 3)


def test_with_held_out_data_the_blind_score_does_not_use_the_test_set():
    original, figures = {"RA": 100.0, "TA": 91.0, "VA": 90.0}, {"UA": 6.0, "RA": 98.0, "VA": 89.0}
    assert tuning.blind_score(figures | {"TA": 10.0}, original) == tuning.blind_score(figures | {"TA": 99.0}, original)


def test_the_blind_scores_of_saved_trials_can_be_recomputed(trials):
    models = {
        (row["design"], row["forget"], row["seed"]): row
        for row in rows.select(saved.read(ROWS), kind="model", model="original")
    }
    for row in trials:
        score = tuning.blind_score(row, models[row["design"], row["forget"], row["seed"]])
        assert row["blind"] == (tuning.DIVERGED if row["diverged"] else pytest.approx(score))


def test_the_best_trial_is_the_first_with_the_lowest_score():
    of = lambda index, blind, gap, method="a": {
        "kind": "trial",
        "method": method,
        "trial": index,
        "blind": blind,
        "gap": gap,
    }
    made = [of(1, 2.0, 5.0), of(0, 2.0, 6.0), of(2, tuning.DIVERGED, 1.0), of(3, 0.0, 0.0, "b"), {"kind": "model"}]
    found = tuning.trials_of(made, {"kind": "trial", "method": "a"})
    assert [row["trial"] for row in found] == [0, 1, 2]
    assert (tuning.best(made[:3], "blind"), tuning.best(made[:3], "gap")) == (0, 2)
