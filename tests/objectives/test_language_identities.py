"""Losses of language models at the limits of their constants, their minima, and what no gradient flows through."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eupmu_jax.objectives import language
from eupmu_jax.objectives.language import Answers

from .test_language import (
    HIDDEN,
    KEPT,
    LOGITS,
    MASK,
    NLL,
    REFERENCE,
    REFERENCE_HIDDEN,
    REFERENCE_NLL,
    SUMS,
    TARGETS,
    V,
    forgotten,
    softplus,
    traced,
)


def slope_of(loss):
    return traced(lambda logits: loss(language.token_nll(logits, TARGETS)), LOGITS)


def ascent_of_answers(nll):
    """Gradient ascent on L, as a mean over answers."""
    return -jnp.mean(language.sequence_nll(nll, MASK)[jnp.array(KEPT)])


@pytest.mark.parametrize(("beta", "close"), [(1e-1, 0.5), (1e-2, 0.06), (1e-4, 6e-4)])
def test_npo_tends_to_ascent_as_beta_tends_to_zero(beta, close):
    found = slope_of(lambda nll: language.npo(Answers(nll, jnp.asarray(MASK), jnp.float32(REFERENCE_NLL)), beta))
    expected = slope_of(ascent_of_answers)
    # sigma(beta rho) = 1/2 + O(beta), so the error falls as beta does.
    assert np.abs(found - expected).max() < close * np.abs(expected).max()


def test_npo_minus_its_constant_tends_to_ascent():
    beta = 1e-3
    value = jax.jit(lambda: language.npo(forgotten(), beta))() - 2 / beta * np.log(2)
    np.testing.assert_allclose(value, -(SUMS - REFERENCE_NLL)[KEPT].mean(), rtol=0.02)


def test_npo_saturates_where_ascent_does_not():
    gone = Answers(jnp.full((1, 2), 1e4), jnp.ones((1, 2)), jnp.zeros(1))
    value, slope = jax.jit(jax.value_and_grad(lambda nll: language.npo(gone._replace(nll=nll))))(gone.nll)
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("length", [1, 3])
def test_simnpo_of_equally_likely_tokens_does_not_depend_on_the_length_of_the_answer(length):
    p, beta = 0.3, 2.5
    value = jax.jit(language.simnpo)(np.full((2, length), -np.log(p), np.float32), np.ones((2, length)), beta)
    np.testing.assert_allclose(value, 2 / beta * np.log1p(p**beta), rtol=1e-6)


def test_weights_of_one_give_ascent():
    ascent = slope_of(lambda nll: language.gradient_ascent(nll, MASK))
    for loss in (functools.partial(language.wga, beta=0.0), functools.partial(language.satimp, beta1=0.0, beta2=0.0)):
        chex.assert_trees_all_close(slope_of(lambda nll, loss=loss: loss(nll, MASK)), ascent, rtol=1e-6)


def test_satimp_without_importance_is_wga():
    np.testing.assert_allclose(
        language.satimp(jnp.float32(NLL), MASK, 2.0, 0.0), language.wga(jnp.float32(NLL), MASK, 2.0), rtol=1e-6
    )


def test_no_gradient_flows_through_the_weights():
    slope = traced(language.wga, np.float32(NLL), MASK)
    np.testing.assert_allclose(slope, -np.exp(-NLL) * MASK / MASK.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: language.kl_to_reference(z, jnp.asarray(REFERENCE), MASK),
        lambda z: language.undial(z, jnp.asarray(REFERENCE), TARGETS, MASK, beta=0.0),
    ],
)
def test_distillation_is_minimal_at_the_reference_and_nowhere_else(loss):
    np.testing.assert_allclose(traced(loss, REFERENCE), 0, atol=1e-7)
    assert jnp.abs(traced(loss, LOGITS)).max() > 1e-3


def test_undial_is_minimal_where_the_true_logit_is_lower_by_beta():
    rest = REFERENCE - 4 * np.eye(V)[TARGETS]
    slope = traced(lambda z: language.undial(z, jnp.asarray(REFERENCE), TARGETS, MASK, beta=4.0), np.float32(rest))
    np.testing.assert_allclose(slope, 0, atol=1e-7)


@jax.jit
@jax.value_and_grad
def lrml_of(shift, tau):
    answer = Answers(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.zeros(1))
    return language.lrml(answer, answer._replace(nll=jnp.full((1, 1), shift)), 1.0, tau)


def test_lrml_is_logistic_for_small_x_and_exponential_for_large():
    for x in (-3.0, -1.0):
        np.testing.assert_allclose(lrml_of(-x, 0.05)[0], softplus(-x), rtol=1e-4)
    for x in (1.0, 3.0):
        np.testing.assert_allclose(lrml_of(-x, 0.05)[0], np.exp(-x), rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0.01, 0.9))
def test_lrml_is_finite_everywhere(x, tau):
    value, slope = lrml_of(-x, tau)
    assert np.isfinite(value)
    assert value >= 0
    assert np.isfinite(slope)


def test_no_gradient_flows_through_references():
    def total(reference_nll, logits, hidden):
        answers = forgotten()._replace(reference_nll=reference_nll)
        return (
            language.npo(answers)
            + language.dpo(answers, answers)
            + language.undial(jnp.asarray(LOGITS), logits, TARGETS, MASK)
            + language.kl_to_reference(jnp.asarray(LOGITS), logits, MASK)
            + language.rmu(jnp.asarray(HIDDEN), hidden, MASK)
        )

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(np.float32(REFERENCE_NLL), REFERENCE, REFERENCE_HIDDEN)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_no_gradient_flows_through_the_weights_of_satimp():
    p = np.exp(-NLL)
    slope = traced(language.satimp, np.float32(NLL), MASK)
    np.testing.assert_allclose(slope, -(p**5) * (1 - p) * MASK / MASK.sum(), rtol=1e-4)


def test_undial_lowers_a_token_to_which_only_the_reference_gives_no_probability():
    masked = jnp.asarray(REFERENCE, jnp.float32).at[..., 0].set(-jnp.inf)
    slope = traced(lambda z: language.undial(z, masked, TARGETS, MASK), np.float32(LOGITS))
    share = np.asarray(jax.nn.softmax(np.float32(LOGITS)))[..., 0]
    np.testing.assert_allclose(slope[..., 0], share * MASK / MASK.sum(), rtol=1e-4, atol=1e-7)
