import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from eupmu_jax.methods import METHODS, Terms
from eupmu_jax.tasks import as_examples, classification

STEPS, CLASSES = 8, 3
SETTINGS = {"optimizer": "sgd", "learning_rate": 0.5, "alpha": 0.2, "max_share": 0.5}


def linear(seed=0):
    """A linear classifier, its weights, and a forget and a retain batch."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(4, CLASSES)).astype(np.float32)
    batches = tuple(
        {"inputs": rng.normal(size=(n, 4)).astype(np.float32), "labels": rng.integers(CLASSES, size=n)} for n in (5, 9)
    )
    return classification(lambda params, inputs: inputs @ params, CLASSES), weights, batches


def ready(settings=SETTINGS):
    task, weights, batches = linear()
    procedure = METHODS["SCRUB"].make(task, Terms(5, 9, STEPS, 0.0), settings)
    prepared = procedure.prepare(jnp.asarray(weights), *(as_examples("set", batch) for batch in batches), None)
    return procedure._replace(step=jax.jit(procedure.step)), prepared, weights, batches


def spoiled(batch):
    return batch | {"inputs": np.full_like(batch["inputs"], np.nan)}


def reads(procedure, prepared, weights, batches, count):
    """Whether the step with this count reads the forget batch, and whether it reads the retain batch."""
    state = procedure.init(jnp.asarray(weights), prepared)
    found = []
    for k in (0, 1):
        fed = tuple(spoiled(batch) if i == k else batch for i, batch in enumerate(batches))
        params, _ = procedure.step(jnp.asarray(weights), prepared, state, fed, jnp.int32(count), None)
        found.append(bool(jnp.isnan(params).any()))
    return tuple(found)


@pytest.mark.parametrize("max_share", [0.25, 0.5, 0.75])
def test_even_steps_of_the_first_share_read_only_the_forget_batch_and_all_others_only_the_retain_batch(max_share):
    run = ready(SETTINGS | {"max_share": max_share})
    is_max = [count % 2 == 0 and count < max_share * STEPS for count in range(STEPS)]
    assert [reads(*run, count) for count in range(STEPS)] == [(max_, not max_) for max_ in is_max]
    forget, retain = sum(is_max) / STEPS, 1 - sum(is_max) / STEPS
    assert run[0].cost.forward == pytest.approx((2 * forget, 2 * retain))
    assert run[0].cost.backward == pytest.approx((forget, retain))


def test_a_whole_run_follows_the_formulas_with_a_fixed_teacher():
    procedure, prepared, teacher, batches = ready()
    params, state = jnp.asarray(teacher), procedure.init(jnp.asarray(teacher), prepared)
    expected = teacher.astype(np.float64)
    for count in range(STEPS):
        params, state = procedure.step(params, prepared, state, batches, jnp.int32(count), None)
        is_max = count in (0, 2)
        batch = batches[0 if is_max else 1]
        x, n = batch["inputs"], len(batch["labels"])
        student = x @ expected
        divergence = 4.0 * x.T @ (softmax(student / 4, 1) - softmax(x @ teacher / 4, 1)) / n
        retained = x.T @ (softmax(student, 1) - np.eye(CLASSES)[batch["labels"]]) / n
        gradient = -divergence if is_max else 0.99 * retained + 0.2 * divergence
        clipped = gradient / max(1.0, np.linalg.norm(gradient))
        expected = expected - 0.5 * (1 - count / STEPS) * clipped
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - teacher).max() > 0.1


def test_the_first_max_step_does_nothing_because_the_student_is_the_teacher():
    procedure, prepared, weights, batches = ready()
    params, _ = procedure.step(
        jnp.asarray(weights), prepared, procedure.init(weights, prepared), batches, jnp.int32(0), None
    )
    np.testing.assert_allclose(params, weights, atol=1e-6)


@pytest.mark.slow
def test_scrub_forgets_two_digits_and_keeps_the_others(digits):
    settings = {"learning_rate": 0.3, "alpha": 0.01, "max_share": 0.5}
    params = digits.run("SCRUB", settings, steps=60)
    assert digits.accuracy(digits.params, digits.forget) > 0.95
    assert digits.accuracy(params, digits.forget) < 0.1
    assert digits.accuracy(params, digits.retain) > 0.98
