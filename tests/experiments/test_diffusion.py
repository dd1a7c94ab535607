"""The attack that finds a forgotten class again, and what judges samples."""

import jax
import numpy as np
import pytest

from experiments.diffusion import run


@pytest.mark.slow
def test_relearning_changes_the_row_of_the_forgotten_class_alone(monkeypatch):
    monkeypatch.setattr(run, "RELEARNING", 3)
    params = run.model()[1](jax.random.key(0))
    # Layers that are not zero, or no gradient would reach the row.
    for layer in ("out", "modulation"):
        params[layer]["kernel"] += jax.random.normal(jax.random.key(1), params[layer]["kernel"].shape)
    found = run.relearned(params, 4, np.arange(50), seed=0)
    rows = np.any(np.asarray(found["conditions"]["embedding"] != params["conditions"]["embedding"]), axis=1)
    rest = [{name: part for name, part in tree.items() if name != "conditions"} for tree in (params, found)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    assert np.flatnonzero(rows).tolist() == [4]


@pytest.mark.slow
def test_the_classifier_knows_real_digits_and_their_distance_to_themselves_is_nothing():
    logits, features = run.classifier()(run.data()["inputs"])
    assert np.mean(np.argmax(logits, -1) == run.data()["labels"]) > 0.99
    assert run.frechet_distance(np.asarray(features), np.asarray(features)) < 1e-3
