"""The diffusion model of digits: its training, the attack on one row of the embedding, and the judge."""

import functools

import jax
import numpy as np
import pytest

from eupmu_jax.benchmark import diffusion


@pytest.fixture(scope="module")
def params():
    made = diffusion.functions()[1](jax.random.key(0))
    # Layers that are not zero, or no gradient would reach the row.
    for layer in ("out", "modulation"):
        made[layer]["kernel"] += jax.random.normal(jax.random.key(1), made[layer]["kernel"].shape)
    return made


@pytest.mark.slow
def test_relearning_changes_the_row_of_the_forgotten_class_alone(params, monkeypatch):
    monkeypatch.setattr(diffusion, "RELEARNING", 3)
    found = diffusion.relearned_row(params, 4, seed=0)
    rows = np.any(np.asarray(found["conditions"]["embedding"] != params["conditions"]["embedding"]), axis=1)
    rest = [{name: part for name, part in tree.items() if name != "conditions"} for tree in (params, found)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    assert np.flatnonzero(rows).tolist() == [4]


@pytest.mark.slow
def test_the_judge_knows_real_digits(monkeypatch):
    real = diffusion.digits()
    logits, features = diffusion.classifier(diffusion.DIGITS)(real["inputs"])
    assert np.mean(np.argmax(logits, -1) == real["labels"]) > 0.99
    assert diffusion.frechet_distance(np.asarray(features), np.asarray(features)) < 1e-3

    def perfect(params, labels, seed, subject):
        rng = np.random.default_rng(seed)
        return real["inputs"][[rng.choice(np.flatnonzero(real["labels"] == label)) for label in np.asarray(labels)]]

    monkeypatch.setattr(diffusion, "samples", perfect)
    figures = diffusion.judge({}, forgotten=3, seed=0)
    assert figures["UA"] < 1
    assert figures["RA"] > 99
    drawn = [diffusion.judge_real(3, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(set(one) == {"RA", "FD"} and one["RA"] > 99 for one in drawn)
    assert drawn[0]["FD"] == pytest.approx(figures["FD"], rel=0.5)
    next_class = lambda params, labels, seed, subject: perfect(params, (labels + 1) % 10, seed, subject)
    monkeypatch.setattr(diffusion, "samples", next_class)
    figures = diffusion.judge({}, forgotten=3, seed=0)
    assert figures["UA"] > 99
    assert figures["RA"] < 1


@pytest.mark.slow
def test_a_training_is_read_from_its_cache(tmp_path):
    ids = np.arange(128)
    made = diffusion.train(ids, 0, tmp_path, epochs=2)
    again = diffusion.train(ids, 0, tmp_path, epochs=2)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    assert made[1:] == again[1:]
    assert len(list(tmp_path.iterdir())) == 1
    diffusion.train(ids, 1, tmp_path, epochs=2)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_attacks_are_those_on_any_model(params, monkeypatch):
    for name, value in {"RELEARNING": 2, "ATTACKED": 4}.items():
        monkeypatch.setattr(diffusion, name, value)
    logits = lambda images: (images.reshape(len(images), -1)[:, :10], None)
    monkeypatch.setattr(diffusion, "classifier", lambda subject: logits)
    monkeypatch.setattr(diffusion, "diffusion_attacks", functools.partial(diffusion.diffusion_attacks, steps=1))
    found = diffusion.attacks(params, 4, seed=0)
    assert found["embedding"] == diffusion.ua(diffusion.relearned_row(params, 4, seed=0), 4, seed=0)
    assert list(found)[1:] == ["forgotten data", "retained data", "no guidance", "ancestral", "noised images"]
