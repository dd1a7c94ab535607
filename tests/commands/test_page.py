"""The demo's page: which methods its headline names, ties, and what its figures show."""

import numpy as np
import pytest

from eupmu_jax.commands import page, picture, report

ORIGINAL = {"method": "original", "UA": 0.0, "RA": 100.0, "TA": 97.0, "MIA": 0.0, "gap": 6.0}
RETRAINED = {"method": "retrained", "UA": 10.0, "RA": 100.0, "TA": 96.0, "MIA": 12.0, "gap": 0.0}
EXAMPLES = {"forget": 100, "test": 1_000}


def rows_with(**gaps):
    made = [row | {"examples": EXAMPLES} for row in (ORIGINAL, RETRAINED)]
    return made + [{"method": name, "gap": gap, "examples": EXAMPLES} for name, gap in gaps.items()]


def test_the_sampling_error_by_hand():
    rate = lambda percent, count: (percent / 100 * count + 1) / (count + 2)
    # BUG: the error of MIA was computed from the rate of UA.
    ua, mia, test = rate(10, 100), rate(RETRAINED["MIA"], 100), rate(96, 1_000)
    deviation = lambda rate, count: np.sqrt(rate * (1 - rate) / count)
    by_hand = np.hypot(deviation(ua, 100) + deviation(mia, 100), deviation(test, 1_000)) / 4
    assert page.sampling_error(rows_with(a=1.0)) == pytest.approx(100 * 1.96 * by_hand)


def test_the_sampling_error_does_not_vanish_where_a_class_is_fully_forgotten():
    rows = rows_with(a=1.0)
    rows[1] = rows[1] | {"UA": 100.0, "MIA": 100.0}
    assert page.sampling_error(rows) > 0.5


def test_all_tied_methods_are_named_nearest_first():
    rows = rows_with(EUPMU=1.2, SalUn=1.0, SCRUB=9.0)
    assert [row["method"] for row in page.best_of(rows)] == ["SalUn", "EUPMU"]
    said = page.headline(rows)
    assert said.startswith("SalUn and EUPMU come nearest to the retrained model: an average gap of 1.00 to 1.20 points")
    assert said.endswith("The untouched model has 6.00.")


def test_a_single_best_method_is_named_alone():
    said = page.headline(rows_with(EUPMU=0.5, SalUn=4.0))
    assert said.startswith("EUPMU comes nearest to the retrained model: an average gap of 0.50 points. The untouched")


def test_an_uninformative_forget_set_is_called_that():
    assert "This forget set is not informative" in page.headline(rows_with(EUPMU=5.9))


def test_diverged_runs_are_not_named():
    assert page.headline(rows_with(EUPMU=None)) == "No method ended with finite figures."


HISTORY = {
    "step": [0, 5, 10],
    "forget_error": [0.0, 0.2, 0.1],
    "weight": [0.0, 1.0, 0.5],
    "retain_error": [0.0, 0.02, 0.01],
    "retain_loss": [0.0, 0.5, 0.1],
}
COLORS = {"EUPMU": "#0b6e4f", "SalUn": "#d9822b"}


def test_the_figure_shows_a_run_with_its_target_interval_and_limit():
    figure = picture.of_runs({"EUPMU": HISTORY}, COLORS, target=0.1, interval=(0.08, 0.13), limit=0.02)
    forget, weight, retain, loss = figure.axes
    np.testing.assert_allclose(forget.lines[0].get_ydata(), [0, 20, 10])
    np.testing.assert_allclose(weight.lines[0].get_ydata(), [0, 1, 0.5])
    assert {text.get_text() for text in forget.texts} == {"unseen data"}
    assert {text.get_text() for text in retain.texts} == {"limit"}
    assert retain.get_ylim()[1] > 2
    assert loss.lines[0].get_ydata()[0] == picture.SMALLEST_LOSS


def test_the_returned_model_is_a_dot_and_a_run_without_weights_has_no_line_of_them():
    bare = {name: values for name, values in HISTORY.items() if name != "weight"} | {"weight": [None] * 3}
    figure = picture.of_runs({"SalUn": bare}, COLORS, ends={"SalUn": {"forget_error": 0.05}})
    forget, weight, _, _ = figure.axes
    assert forget.lines[-1].get_ydata() == [5.0]
    assert not weight.lines
    assert picture.svg(figure).startswith("<svg")


def test_errors_that_are_not_rates_are_not_shown_as_percentages():
    figure = picture.of_runs({"EUPMU": HISTORY}, COLORS, target=0.1, limit=0.02, rates=False)
    forget, _, retain, loss = figure.axes
    np.testing.assert_allclose(forget.lines[0].get_ydata(), [0, 0.2, 0.1])
    assert (forget.get_title("left"), loss.get_title("left")) == ("error on the forget set", "loss on the retain set")
    assert retain.get_ylim()[1] < 0.1


def test_an_outlying_run_does_not_flatten_the_others():
    far = HISTORY | {"forget_error": [0.0, 1.0, 1.0]}
    figure = picture.of_runs({"EUPMU": HISTORY, "SalUn": far}, COLORS, target=0.1)
    assert figure.axes[0].get_ylim()[1] < 100


def test_figures_that_are_not_finite_are_left_out():
    # BUG: they are null in a record, and `eupmu report` ended with a traceback.
    figure = picture.of_runs({"EUPMU": HISTORY}, COLORS, ends={"EUPMU": {"retain_loss": None, "retain_error": 0.01}})
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 2, 1]
    found = {"relearning": {"on retained": {"step": [0, 40], "accuracy": [None, 50.0]}}}
    assert [report._relearned(found, "on retained", rates) for rates in (True, False)] == ["- to 50", "- to 0.5"]
