import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from eupmu_jax.objectives import (
    bounded_ascent,
    cross_entropy,
    gradient_ascent,
    kl_to_teacher,
    kl_to_uniform,
    random_labels,
)

CLASSES = 5
LOGITS = np.random.default_rng(0).normal(size=(2, 7, CLASSES)).astype(np.float32) * 3
TEACHER = np.random.default_rng(1).normal(size=(2, 7, CLASSES)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(CLASSES, size=(2, 7))
NLL = -np.take_along_axis(scipy.special.log_softmax(LOGITS, -1), LABELS[..., None], -1)[..., 0]


def divergence(temperature):
    teacher, student = (scipy.special.softmax(x / temperature, -1) for x in (TEACHER, LOGITS))
    return temperature**2 * scipy.special.rel_entr(teacher, student).sum(-1).mean()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: cross_entropy(LOGITS, LABELS), NLL.mean()),
        (lambda: gradient_ascent(LOGITS, LABELS), -NLL.mean()),
        (lambda: bounded_ascent(LOGITS, LABELS), np.maximum(np.log(CLASSES) - NLL, 0).mean()),
        (lambda: bounded_ascent(LOGITS, LABELS, bound=3.0), np.maximum(3 - NLL, 0).mean()),
        (lambda: kl_to_teacher(LOGITS, TEACHER), divergence(1.0)),
        (lambda: kl_to_teacher(LOGITS, TEACHER, temperature=3.0), divergence(3.0)),
        (lambda: kl_to_uniform(LOGITS), -scipy.special.log_softmax(LOGITS, -1).mean() - np.log(CLASSES)),
    ],
)
def test_losses_follow_their_formulas(loss, expected):
    np.testing.assert_allclose(loss(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: cross_entropy(logits, LABELS),
        lambda logits: gradient_ascent(logits, LABELS),
        lambda logits: bounded_ascent(logits, LABELS),
        lambda logits: bounded_ascent(logits, LABELS, bound=2.0),
        lambda logits: kl_to_teacher(logits, jnp.asarray(TEACHER)),
        kl_to_uniform,
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_losses_are_computed_in_float32_from_the_rounded_logits(loss, dtype):
    logits = jnp.asarray(LOGITS, dtype)
    value, grads = jax.value_and_grad(loss)(logits)
    assert value.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, logits)
    np.testing.assert_allclose(value, loss(logits.astype(jnp.float32)), rtol=1e-6)


def test_a_forgotten_example_has_no_gradient():
    logits = jnp.array([[10.0, 0.0, 0.0], [-10.0, 0.0, 0.0]])
    grads = jax.grad(bounded_ascent)(logits, jnp.array([0, 0]))
    assert jnp.any(grads[0] != 0)
    np.testing.assert_array_equal(grads[1], 0)
    assert bounded_ascent(logits[1:], jnp.array([0])) == 0


def test_until_an_example_is_forgotten_its_gradient_is_that_of_ascent():
    logits, labels = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0])
    np.testing.assert_array_equal(jax.grad(bounded_ascent)(logits, labels), jax.grad(gradient_ascent)(logits, labels))


def test_no_gradient_flows_through_the_teacher():
    np.testing.assert_array_equal(jax.grad(kl_to_teacher, argnums=1)(jnp.asarray(LOGITS), jnp.asarray(TEACHER)), 0)


@pytest.mark.parametrize("classes", [2, 10])
def test_random_labels_are_uniform_over_the_wrong_classes(classes):
    truth = jnp.full((classes, 2000), jnp.arange(classes)[:, None])
    drawn = random_labels(jax.random.key(0), truth, classes)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, truth)
    for label in range(classes):
        counts = np.bincount(drawn[label], minlength=classes)
        assert len(counts) == classes
        assert counts[label] == 0
        if classes > 2:
            assert scipy.stats.chisquare(np.delete(counts, label)).pvalue > 1e-4


def test_random_labels_are_determined_by_the_key():
    labels = jnp.zeros(100, jnp.int32)
    first, again, other = (random_labels(jax.random.key(seed), labels, 10) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.mean(first != other) > 0.5


@pytest.mark.parametrize(("dtype", "classes"), [(jnp.int8, 100), (jnp.uint8, 200), (jnp.int32, 100)])
def test_random_labels_are_wrong_labels_whatever_the_dtype(dtype, classes):
    # BUG: in int8, labels + offsets overflowed from 65 classes on (in uint8 from 129), so the truth could be drawn.
    truth = jnp.full(20_000, classes - 1, dtype)
    drawn = random_labels(jax.random.key(0), truth, classes)
    assert drawn.dtype == dtype
    assert jnp.all((drawn >= 0) & (drawn < classes) & (drawn != truth))
    assert len(jnp.unique(drawn)) == classes - 1


def test_64_bit_numpy_labels_give_no_warning():
    drawn = random_labels(jax.random.key(0), np.arange(10), 10)
    assert not jnp.any(drawn == jnp.arange(10))


def test_a_wrong_label_must_exist():
    with pytest.raises(ValueError, match=r"^num_classes: got 1"):
        random_labels(jax.random.key(0), jnp.zeros(3, jnp.int32), 1)


def test_a_class_that_both_models_mask_adds_nothing():
    # BUG: 0 times infinity turned the loss and its gradient into NaN.
    masked = lambda logits: jnp.pad(jnp.asarray(logits), ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
    ours, plain = (
        jax.value_and_grad(lambda logits, to=to: kl_to_teacher(to(logits), to(TEACHER)))(jnp.asarray(LOGITS))
        for to in (masked, jnp.asarray)
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-6)


def test_a_masked_class_has_no_share_of_a_uniform_guess():
    # BUG: the KL to a uniform guess over all classes was infinite.
    masked = lambda logits: jnp.pad(jnp.asarray(logits), ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
    ours, plain = (
        jax.value_and_grad(lambda logits, to=to: kl_to_uniform(to(logits)))(jnp.asarray(LOGITS))
        for to in (masked, jnp.asarray)
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (4, 1), ()])
@pytest.mark.parametrize("loss", [cross_entropy, gradient_ascent, bounded_ascent])
def test_there_must_be_one_label_for_each_row(loss, shape):
    with pytest.raises(ValueError, match=r"^labels: got shape .*, expected \(4,\), a class for each row"):
        loss(jnp.zeros((4, 3)), jnp.zeros(shape, int))


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (4, 5)])
def test_teacher_and_student_have_logits_of_one_shape(shape):
    # BUG: one row, or one class, was compared with all of them.
    with pytest.raises(ValueError, match=r"^teacher_logits: got shape .*, expected that of logits, \(4, 3\)"):
        kl_to_teacher(jnp.zeros((4, 3)), jnp.zeros(shape))
