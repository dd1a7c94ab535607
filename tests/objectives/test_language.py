"""Losses of language models against float64 NumPy formulas and numbers by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, rel_entr, softmax

from eupmu_jax.objectives import language
from eupmu_jax.objectives.language import Answers

N, T, V, D = 4, 6, 9, 5
RNG = np.random.default_rng(0)
LOGITS, REFERENCE, OTHER = (2 * RNG.normal(size=(N, T, V)).astype(np.float32) for _ in range(3))
TARGETS = RNG.integers(V, size=(N, T))
# A prompt precedes each answer and padding follows. Answers have lengths 3, 1, 0 and 5; others have 2, 4, 3 and 0.
MASK = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
OTHER_MASK = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
HIDDEN, REFERENCE_HIDDEN = (RNG.normal(size=(N, T, D)).astype(np.float32) for _ in range(2))
VECTOR = RNG.normal(size=D).astype(np.float32)


def nll64(logits):
    return -np.take_along_axis(log_softmax(logits.astype(np.float64), -1), TARGETS[..., None], -1)[..., 0]


def sums(logits, mask):
    return np.array(
        [sum(loss for loss, m in zip(*row, strict=True) if m) for row in zip(nll64(logits), mask, strict=True)]
    )


NLL, REFERENCE_NLL = nll64(LOGITS), sums(REFERENCE, MASK)
OTHER_NLL, OTHER_REFERENCE = sums(OTHER, OTHER_MASK), sums(REFERENCE, OTHER_MASK)
LENGTHS, SUMS = MASK.sum(1), sums(LOGITS, MASK)
KEPT = [0, 1, 3]  # with an answer
PAIRS = [0, 1]  # with both


def over_tokens(values):
    return values[MASK == 1].mean()


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rho():
    return (OTHER_REFERENCE - OTHER_NLL - (REFERENCE_NLL - SUMS))[PAIRS]


def modulated(x, tau):
    s = expit(x / tau)
    return ((1 - s) * softplus(-x) + s * np.exp(-x)).mean()


def rmu64(target):
    squares = ((HIDDEN.astype(np.float64) - target) ** 2).sum(-1) / D
    return np.mean([squares[i][MASK[i] == 1].mean() for i in KEPT])


def forgotten(logits=LOGITS, mask=MASK):
    return Answers(language.token_nll(jnp.asarray(logits), TARGETS), jnp.asarray(mask), jnp.float32(REFERENCE_NLL))


def alternative():
    return Answers(
        language.token_nll(jnp.asarray(OTHER), TARGETS), jnp.asarray(OTHER_MASK), jnp.float32(OTHER_REFERENCE)
    )


def of_nll(loss, **constants):
    return lambda logits, mask: loss(language.token_nll(logits, TARGETS), mask, **constants)


# Each is a function of the logits (or hidden states) and the mask.
LOSSES = {
    "token_mean": of_nll(language.token_mean),
    "gradient_ascent": of_nll(language.gradient_ascent),
    "wga": of_nll(language.wga, beta=0.7),
    "satimp": of_nll(language.satimp),
    "kl_to_reference": lambda logits, mask: language.kl_to_reference(logits, jnp.asarray(REFERENCE), mask),
    "undial": lambda logits, mask: language.undial(logits, jnp.asarray(REFERENCE), TARGETS, mask, beta=3.0),
    "npo": lambda logits, mask: language.npo(forgotten(logits, mask)),
    "simnpo": of_nll(language.simnpo, delta=0.3),
    "dpo": lambda logits, mask: language.dpo(forgotten(logits, mask), alternative()),
    "lrml": lambda logits, mask: language.lrml(forgotten(logits, mask), alternative()),
}
EXPECTED = {
    "token_mean": over_tokens(NLL),
    "gradient_ascent": -over_tokens(NLL),
    "wga": -over_tokens(np.exp(-NLL) ** 0.7 * NLL),
    "satimp": -over_tokens(np.exp(-NLL) ** 5 * (1 - np.exp(-NLL)) * NLL),
    "kl_to_reference": over_tokens(
        rel_entr(softmax(REFERENCE.astype(float), -1), softmax(LOGITS.astype(float), -1)).sum(-1)
    ),
    "undial": over_tokens(
        -(softmax(REFERENCE.astype(float) - 3 * np.eye(V)[TARGETS], -1) * log_softmax(LOGITS.astype(float), -1)).sum(-1)
    ),
    "npo": 20 * softplus(-0.1 * (SUMS - REFERENCE_NLL))[KEPT].mean(),
    "simnpo": 0.8 * softplus(-2.5 * (SUMS / np.maximum(LENGTHS, 1) - 0.3))[KEPT].mean(),
    "dpo": 20 * softplus(-0.1 * rho()).mean(),
    "lrml": modulated(0.05 * rho(), 0.05),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


@jax.jit
def every(logits, mask):
    """The value and the gradient of every loss, in one program for all tests."""
    return {name: jax.value_and_grad(loss)(logits, mask) for name, loss in LOSSES.items()}


def traced(loss, *args):
    """The gradient of the loss, compiled as a whole."""
    return jax.jit(jax.grad(loss))(*args)


@EVERY
def test_losses_follow_their_formulas(name):
    np.testing.assert_allclose(every(LOGITS, MASK)[name][0], EXPECTED[name], rtol=2e-5)


def test_sums_and_lengths_of_answers():
    np.testing.assert_allclose(language.sequence_nll(jnp.float32(NLL), MASK), SUMS, rtol=1e-6)
    np.testing.assert_array_equal(language.answer_lengths(jnp.asarray(MASK)), LENGTHS)


@pytest.mark.parametrize("target", [VECTOR, REFERENCE_HIDDEN], ids=["forget", "retain"])
def test_rmu_follows_its_formula(target):
    np.testing.assert_allclose(jax.jit(language.rmu)(HIDDEN, target, MASK), rmu64(target), rtol=1e-5)


def test_losses_match_numbers_by_hand():
    # Two tokens have probabilities 1/2 and 1/4, so L = 3 ln 2. The reference also gives 1/8, so the log ratio is 0.
    def found(nll, mask):
        same = Answers(nll, mask, jnp.log(jnp.array([8.0])))
        half = same._replace(reference_nll=jnp.log(jnp.array([4.0])))  # the model gives it half the probability
        twice = same._replace(reference_nll=jnp.log(jnp.array([16.0])))
        return {
            "mean": language.token_mean(nll, mask),
            "wga": language.wga(nll, mask),
            "satimp": language.satimp(nll, mask, 1.0, 1.0),
            "npo at the reference": language.npo(same, beta=0.5),
            "npo": language.npo(half, beta=1.0),
            "simnpo": language.simnpo(nll, mask, beta=2.0),
            "dpo at the reference": language.dpo(same, same, beta=0.1),
            "dpo": language.dpo(half, twice, beta=1.0),
            "lrml at the reference": language.lrml(same, same),
            "lrml": language.lrml(half, twice, beta=1.0, tau=1.0),
        }

    expected = {
        "mean": 1.5 * np.log(2),
        "wga": -(np.log(2) / 2 + np.log(4) / 4) / 2,
        "satimp": -(np.log(2) / 4 + np.log(4) * 3 / 16) / 2,
        "npo at the reference": 4 * np.log(2),
        "npo": -2 * np.log(2 / 3),
        "simnpo": -np.log(8 / 9),
        "dpo at the reference": 20 * np.log(2),
        "dpo": -2 * np.log(4 / 5),
        "lrml at the reference": (np.log(2) + 1) / 2,
        "lrml": 0.2 * -np.log(4 / 5) + 0.8 / 4,
    }
    values = jax.jit(found)(np.log(np.float32([[2.0, 4.0]])), np.ones((1, 2)))
    assert values == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


@EVERY
def test_prompts_and_padding_change_nothing(name):
    other = np.where(MASK[..., None] == 1, LOGITS, 50 * np.cos(np.arange(V, dtype=np.float32)))
    (one, slope), (two, its) = (every(logits, MASK)[name] for logits in (LOGITS, other))
    np.testing.assert_array_equal(one, two)
    chex.assert_trees_all_equal(slope, its)
    np.testing.assert_array_equal(slope[MASK == 0], 0)


@EVERY
def test_a_batch_without_any_answer_has_loss_and_gradient_zero(name):
    value, slope = every(LOGITS, np.zeros_like(MASK))[name]
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)


def test_rmu_without_an_answer_is_zero():
    value, slope = jax.jit(jax.value_and_grad(language.rmu))(HIDDEN, VECTOR, np.zeros_like(MASK))
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)


@EVERY
def test_losses_are_computed_in_float32_from_the_rounded_logits(name):
    logits = LOGITS.astype(jnp.bfloat16)
    value, slope = every(logits, MASK)[name]
    assert value.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, every(np.asarray(logits, np.float32), MASK)[name][0], rtol=1e-6)


@EVERY
def test_gradients_are_finite_for_certain_and_for_forgotten_tokens(name):
    for scale in (300.0, -300.0):
        value, slope = every(np.float32(scale * np.eye(V)[TARGETS]), MASK)[name]
        assert np.isfinite(value)
        chex.assert_tree_all_finite(slope)


def test_rmu_does_not_depend_on_the_rest_of_the_batch():
    # A published implementation divides (b,) sums by (b, 1) counts, which combines every answer with every length.
    value = jax.jit(language.rmu)
    alone = [value(HIDDEN[i : i + 1], VECTOR, MASK[i : i + 1]) for i in KEPT]
    np.testing.assert_allclose(value(HIDDEN, VECTOR, MASK), np.mean(alone), rtol=1e-6)
    slope = traced(lambda h: language.rmu(h, VECTOR, MASK[:2]) * 2, HIDDEN[:2])
    lone = traced(lambda h: language.rmu(h, VECTOR, MASK[:1]), HIDDEN[:1])
    np.testing.assert_allclose(slope[:1], lone, rtol=1e-6)


def test_the_control_vector_is_a_fixed_direction_of_the_requested_length():
    first, again, other = (language.control_vector(jax.random.key(seed), 64, 20.0) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(jnp.linalg.norm(first), 20.0, rtol=1e-6)
    assert jnp.all(first >= 0)
    assert not jnp.allclose(first, other)


BAD = {
    "mask": (
        lambda: language.token_mean(jnp.zeros((2, 3)), jnp.ones(3)),
        r"mask: got shape \(3,\), expected that of nll",
    ),
    "reference of tokens": (
        lambda: language.npo(Answers(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.zeros((2, 1)))),
        r"reference_nll: got shape \(2, 1\), expected one number for each sequence, \(2,\)",
    ),
    "another vocabulary": (
        lambda: language.undial(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.ones((2, 3))),
        r"reference_logits: got shape \(2, 3, 4\), expected that of logits, \(2, 3, 5\)",
    ),
    "other hidden states": (
        lambda: language.rmu(jnp.zeros((2, 3, 5)), jnp.zeros((3, 5)), jnp.ones((2, 3))),
        r"target: got shape \(3, 5\), expected \(5,\) or that of hidden, \(2, 3, 5\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_shapes_that_would_broadcast_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(call)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [language.kl_to_reference, language.undial], ids=["kl", "undial"])
def test_a_padded_vocabulary_adds_nothing(loss):
    # BUG: 0 times infinity turned the loss and its gradient into NaN.
    padded = lambda logits: jnp.pad(jnp.asarray(logits), ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf)
    more = (jnp.zeros(MASK.shape, int),) if loss is language.undial else ()
    ours, plain = (
        jax.value_and_grad(lambda logits, to=to: loss(to(logits), to(REFERENCE), *more, MASK))(jnp.asarray(LOGITS))
        for to in (padded, jnp.asarray)
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-5)


@pytest.mark.parametrize("loss", [language.wga, language.satimp])
def test_a_masked_token_outside_the_vocabulary_does_no_harm(loss):
    # BUG: the weight of padding was NaN, and therefore the gradient.
    targets = np.where(MASK == 1, TARGETS, V)
    slope = jax.grad(lambda logits: loss(language.token_nll(logits, targets), MASK))(LOGITS)
    chex.assert_tree_all_finite(slope)
    assert np.any(np.asarray(slope)[MASK == 1])


@pytest.mark.parametrize("loss", [language.wga, language.satimp])
def test_tokens_that_are_forgotten_entirely_are_left_alone(loss):
    # BUG: a weight of 0 times an infinite loss made the loss NaN.
    nll, mask = jnp.array([[1.0, jnp.inf]]), jnp.ones((1, 2))
    value, slope = jax.value_and_grad(loss)(nll, mask)
    np.testing.assert_allclose(value, loss(nll[:, :1], mask[:, :1]) / 2, rtol=1e-6)
    assert slope[0, 1] == 0
    assert jnp.isnan(loss(jnp.array([[1.0, jnp.nan]]), mask))


def test_sums_of_half_precision_losses_are_float32():
    nll = jnp.full((1, 1000), 1.0, jnp.bfloat16)
    for found in (
        language.sequence_nll(nll, jnp.ones((1, 1000))),
        1000 * language.token_mean(nll, jnp.ones((1, 1000))),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, 1000)
