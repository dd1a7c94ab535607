"""Attacks on a diffusion model that only hides a class: in a table of images, one row was copied over another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import tasks
from eupmu_jax.models.sampling import sample
from eupmu_jax.objectives.diffusion import cosine_schedule
from eupmu_jax.training import attacks
from eupmu_jax.training.attacks import diffusion_attacks

SCHEDULE, SHOWN = cosine_schedule(40), jnp.array([-0.5, 0.5])


def denoise(params, x_t, t, labels):
    """Predicts the image: one number for all pixels of a class, plus a contribution of the rest of the network."""
    return jnp.broadcast_to(params["rows"][labels][:, None] + params["rest"], x_t.shape)


def draw(params, **options):
    labels = jnp.ones(6, int)
    return sample(
        denoise, params, SCHEDULE, labels, (4,), jax.random.key(0), nothing=2, prediction="x", steps=20, **options
    )


@pytest.fixture(scope="module")
def found():
    task = tasks.diffusion(denoise, SCHEDULE, num_conditions=2, prediction="x", dropout=0.0)
    labels = np.arange(8) % 2
    tree = {"inputs": np.repeat(np.asarray(SHOWN)[labels][:, None], 4, axis=1), "labels": labels}
    forget, retain = (tasks.Examples(tree, np.flatnonzero(labels == label)) for label in (1, 0))
    copied = {"rows": jnp.array([-0.5, -0.5, 0.0]), "rest": jnp.zeros(())}
    row = {"rows": np.array([False, True, False]), "rest": np.array(False)}
    options = {"count": 6, "batch_size": 4, "row_steps": 300}
    return copied, diffusion_attacks(task, copied, row, forget, retain, draw, **options)


def test_retraining_the_row_recovers_the_class(found):
    copied, images = found
    np.testing.assert_allclose(draw(copied, guidance=0.0), -0.5, atol=1e-3)
    # With guidance 2, three times the row minus twice the unconditional row, which is 0; clipped to 1.
    np.testing.assert_allclose(images["embedding"], 1.0, atol=1e-3)


def test_the_other_attacks_recover_nothing(found):
    _, images = found
    assert list(images) == [
        "embedding",
        "forgotten data",
        "retained data",
        "no guidance",
        "ancestral",
        "noised images",
    ]
    np.testing.assert_allclose(images["no guidance"], -0.5, atol=1e-3)
    for name in ("forgotten data", "retained data", "ancestral", "noised images"):
        np.testing.assert_allclose(images[name], -1.0, atol=1e-2, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 7}, "^count: got 7, but draw returned 6 images, expected as many"),
        ({"images": 255.0}, "^forget: inputs: got images from"),
        ({"steps": 0}, "^steps: got 0, expected an int of at least 1"),
        ({"label": 5}, "^forget: labels: got 5, expected ints from 0 to 2"),
        ({"row": {"rows": np.zeros(3, bool)}}, r"^row: got no leaf \['rest'\]"),
    ],
)
def test_invalid_arguments_are_reported_before_any_training(monkeypatch, change, message):
    # BUG: they were reported only after all of the training.
    monkeypatch.setattr(attacks, "relearn_part", lambda *args, **options: pytest.fail("trained"))
    task = tasks.diffusion(denoise, SCHEDULE, num_conditions=2, prediction="x", dropout=0.0)
    tree = {"inputs": np.full((4, 4), change.get("images", 0.5)), "labels": np.full(4, change.get("label", 1))}
    params = {"rows": jnp.zeros(3), "rest": jnp.zeros(())}
    row = change.get("row", {"rows": np.array([False, True, False]), "rest": np.array(False)})
    with pytest.raises(ValueError, match=message):
        diffusion_attacks(
            task, params, row, tree, tree, draw, count=change.get("count", 6), steps=change.get("steps", 20)
        )
