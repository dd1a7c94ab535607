import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import rel_entr, softmax

from eupmu_jax import objectives
from eupmu_jax.methods import METHODS, Terms
from eupmu_jax.tasks import as_examples, classification
from eupmu_jax.training.unlearning import unlearn

CLASSES, FEATURES = 3, 4
SETTINGS = {"optimizer": "sgd", "learning_rate": 0.5, "temperature": 2.0, "retain_weight": 3.0}


def linear():
    """A procedure for a linear classifier, its teachers, a student that differs from both, and the two batches."""
    rng = np.random.default_rng(0)
    competent, student = rng.normal(size=(2, FEATURES, CLASSES))
    batches = tuple({"inputs": rng.normal(size=(n, FEATURES))} for n in (5, 9))
    fresh = lambda key: jax.random.normal(key, (FEATURES, CLASSES))
    task = classification(lambda params, inputs: inputs @ params, CLASSES, fresh_params=fresh)
    procedure = METHODS["Bad Teacher"].make(task, Terms(5, 9, 10, 0.0), SETTINGS)
    sets = (as_examples("set", batch) for batch in batches)
    teachers = procedure.prepare(jnp.asarray(competent), *sets, jax.random.key(1))
    return procedure._replace(step=jax.jit(procedure.step)), teachers, jnp.asarray(student), batches


def divergence(student, teacher, images, temperature):
    """T^2 times the mean of KL(teacher || student), computed with SciPy."""
    p, q = (softmax(images @ np.asarray(w, np.float64) / temperature, 1) for w in (teacher, student))
    return temperature**2 * rel_entr(p, q).sum(1).mean()


def test_the_incompetent_teacher_is_untrained_and_the_competent_one_is_the_original():
    _, (incompetent, competent), _, _ = linear()
    np.testing.assert_array_equal(incompetent, jax.random.normal(jax.random.key(1), (FEATURES, CLASSES)))
    assert not np.allclose(incompetent, competent)


@pytest.mark.parametrize("count", [0, 5])
def test_a_step_descends_the_divergences_that_scipy_computes(count):
    procedure, teachers, student, batches = linear()
    state = procedure.init(student, teachers)
    for k in range(count):
        # Only advances the schedule.
        _, state = procedure.step(student, teachers, state, batches, jnp.int32(k), None)
    params, _ = procedure.step(student, teachers, state, batches, jnp.int32(count), None)

    def total(flat):
        parts = [
            divergence(flat.reshape(student.shape), teacher, batch["inputs"], 2.0)
            for teacher, batch in zip(teachers, batches, strict=True)
        ]
        return parts[0] + 3.0 * parts[1]

    gradient = approx_fprime(np.asarray(student, np.float64).ravel(), total, 1e-6).reshape(student.shape)
    assert np.linalg.norm(gradient) > 1
    expected = student - 0.5 * (1 - count / 10) * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(params, expected, atol=1e-4)


def test_labels_are_not_read():
    procedure, teachers, student, batches = linear()
    state = procedure.init(student, teachers)
    step = lambda fed: procedure.step(student, teachers, state, fed, jnp.int32(0), None)[0]
    labelled = tuple(batch | {"labels": np.full(len(batch["inputs"]), -1)} for batch in batches)
    chex.assert_trees_all_equal(step(batches), step(labelled))


@pytest.mark.slow
def test_on_two_digits_the_student_approaches_the_untrained_model_and_it_keeps_the_others(digits):
    settings = {"learning_rate": 0.3, "temperature": 1.0, "retain_weight": 1.0}
    params = digits.run("Bad Teacher", settings, steps=60, seed=2)
    logits = lambda params: digits.task.outputs(params, digits.forget.tree, None)
    # A run with seed n prepares with the key of n + 2.
    untrained, other = (logits(digits.task.fresh_params(jax.random.key(seed))) for seed in (4, 3))
    distance = lambda params, teacher: float(objectives.kl_to_teacher(logits(params), teacher))
    assert distance(params, untrained) < 0.1 * distance(digits.params, untrained)
    assert distance(params, untrained) < 0.8 * distance(params, other)
    assert digits.accuracy(params, digits.forget) < 0.3
    assert digits.accuracy(params, digits.retain) > 0.97


@pytest.mark.parametrize("frozen", [None, {"body": True, "head": False}])
@pytest.mark.parametrize("fresh", [{"body": np.ones((4, 5)), "head": np.ones((5, 3))}, {"w": np.ones((4, 3))}])
def test_untrained_parameters_of_another_model_are_named_before_any_step(fresh, frozen):
    # BUG: they raised a KeyError from the model, or an error of JAX about trees or dot_general.
    params = {"body": jnp.ones((FEATURES, FEATURES)), "head": jnp.ones((FEATURES, CLASSES))}
    apply = lambda params, inputs: inputs @ params["body"] @ params["head"]
    task = classification(apply, CLASSES, fresh_params=lambda key: fresh)
    data = {"inputs": np.ones((6, FEATURES), np.float32), "labels": np.arange(6) % CLASSES}
    with pytest.raises(ValueError, match=r"^task\.fresh_params: .*params"):
        unlearn("Bad Teacher", task, params, data, data, frozen=frozen, steps=1, probes=0)
