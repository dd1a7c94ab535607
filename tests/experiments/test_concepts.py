"""Prompts and concepts of the emoji, and the figure of an erased word."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from eupmu_jax.benchmark import rows
from eupmu_jax.methods import METHODS
from experiments.concepts import models, page, run


@pytest.fixture(scope="module")
def found():
    try:
        return models.data()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_what_the_page_says_of_losses_on_flags_is_in_the_rows():
    saved = {row["model"]: row for row in rows.read(run.ROWS)}
    losses = {model: row["forget_loss"] for model, row in saved.items()}
    ours, told = saved["EUPMU"], saved["EUPMU, told the level"]
    assert 1.9 < losses["retrained"] / losses["original"] < 2.2
    assert ours["target"] < losses["EUPMU"] < losses["retrained"] == told["target"]
    assert ours["shown"]["flag"] > told["shown"]["flag"] == 0
    assert f"rise by {told['limit']:.4f}." in page.run.ROWS.with_name("page.md").read_text().replace("\n", " ")


@pytest.mark.slow
def test_only_flags_are_prompted_by_a_single_word(found):
    assert len(found.concepts) == len(found.tree["inputs"]) > 500
    flag = np.eye(len(found.words))[found.words.index("flag")]
    asked = found.prompts[found.tree["labels"]]
    np.testing.assert_array_equal((asked == flag).all(1), found.concepts == 0)
    assert not asked[found.concepts != 0, found.words.index("flag")].any()


@pytest.mark.slow
def test_a_prompt_is_the_mean_of_its_words_and_the_last_is_empty(found):
    np.testing.assert_allclose(found.prompts.sum(1), [1] * models.nothing() + [0], rtol=1e-6)
    words = models.Words(len(found.words), 8, rngs=nnx.Rngs(0))
    both = np.zeros(len(found.words), np.float32)
    both[[0, 1]] = 0.5
    np.testing.assert_allclose(words(both[None])[0], words.embedding[...][:2].mean(0), rtol=1e-5)


@pytest.mark.slow
def test_the_classifier_is_tested_on_emoji_that_it_was_not_trained_on(found):
    assert 0.1 < found.tested.mean() < 0.4
    for concept in range(len(models.CONCEPTS)):
        here = found.concepts == concept
        assert here[found.tested].any(), models.CONCEPTS[concept]
        assert here[~found.tested].any(), models.CONCEPTS[concept]


def test_the_figure_is_drawn_from_the_saved_samples(tmp_path):
    page.draw(tmp_path)
    committed = page.run.ROWS.parents[1] / "figures" / "concepts.png"
    with Image.open(committed) as kept, Image.open(tmp_path / "concepts.png") as drawn:
        difference = np.abs(np.asarray(kept, float) - np.asarray(drawn, float))
    # Fonts may differ slightly between versions of Matplotlib, but the samples do not.
    assert difference.mean() < 4


def test_methods_of_an_older_version_are_run_again():
    names = [run.TOLD, *run.METHODS]
    made = [{"model": name, "version": METHODS[name.split(",")[0]].version} for name in names]
    assert run.missing([]) == names
    assert run.missing([{"model": "original"}, *made]) == []
    assert run.missing([made[0] | {"version": METHODS["EUPMU"].version - 1}, *made[1:]]) == names[:1]
