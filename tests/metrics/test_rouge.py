"""ROUGE-L by hand, and the figures computed from it; the scores need rouge-score."""

import importlib.util
import sys

import numpy as np
import pytest

from eupmu_jax import metrics
from eupmu_jax.metrics.rouge import shortened

MISSING = importlib.util.find_spec("rouge_score") is None
needs_package = pytest.mark.skipif(MISSING, reason="rouge-score is not installed")


@needs_package
def test_recall_and_f1_by_hand():
    # The longest common subsequence of "a b c d" and "a c x d y" is "a c d", of 3 words.
    found = metrics.rouge_l(["a c x d y", "", "z"], ["a b c d", "a b", "z"])
    np.testing.assert_allclose(found.recall, [3 / 4, 0, 1])
    np.testing.assert_allclose(found.f1, [2 * 3 / (4 + 5), 0, 1])


@needs_package
def test_words_are_stemmed_and_case_and_punctuation_are_ignored():
    np.testing.assert_allclose(metrics.rouge_l(["The dogs, running!"], ["the dog runs"]).recall, 1)


@needs_package
def test_the_figures_of_muse_are_mean_f1_scores():
    answers = ["in the year 1881\n\nQuestion: Who?", " in 1881 Question: Where?"]
    truths = ["in the year 1881", "1881"]
    assert metrics.knowmem(answers, truths) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.verbmem(truths, truths) == 1
    assert metrics.verbmem(answers, truths) < metrics.knowmem(answers, truths)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Paris", "Paris"), ("Paris\n \nLyon", "Paris"), ("\n\nParis\nQuestion: Who", ""), ("", "")],
)
def test_answers_end_at_a_blank_line_or_a_question(answer, expected):
    assert shortened(answer) == expected


def test_a_script_that_rouge_ignores_is_warned_about(caplog):
    assert metrics.rouge_l(["a city", "…"], ["a city", "…"]).f1.dtype == float
    assert not caplog.text
    assert metrics.rouge_l(["Мария", "a"], ["Мария", "a"]).recall.tolist() == [0, 1]
    assert "references: 1 of 2 have no letter from a to z" in caplog.text


def test_the_error_for_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"rouge-score: install eupmu-jax\[language\]"):
        metrics.rouge_l(["a"], ["a"])


@pytest.mark.parametrize(("generated", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_texts_that_do_not_pair_are_refused(generated, references):
    with pytest.raises(ValueError, match=r"^references: got "):
        metrics.rouge_l(generated, references)


@pytest.mark.parametrize(
    ("given", "name"), [(("a city", ["a city"]), "generated"), ((["a city"], "a town"), "references")]
)
def test_a_single_text_is_refused(given, name):
    # BUG: two texts of one length were compared letter by letter.
    with pytest.raises(ValueError, match=f"^{name}: got the text 'a .*', expected a list of texts$"):
        metrics.rouge_l(*given)


def test_an_entry_that_is_not_a_text_is_refused():
    with pytest.raises(ValueError, match=r"^references\[1\]: got None, expected a text"):
        metrics.rouge_l(["a", "b"], ["a", None])


@needs_package
def test_muse_does_not_stem():
    assert metrics.verbmem(["he runs quickly"], ["he running quick"]) == pytest.approx(1 / 3)
    assert metrics.rouge_l(["he runs quickly"], ["he running quick"]).f1[0] == pytest.approx(2 / 3)
