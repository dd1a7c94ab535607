r"""Objectives for language models: functions of the loss of every token and of a mask of the answers.

Arrays of tokens are `(n, T)`: the T tokens that are predicted, so the logits `(n, T, V)` at a position predict the
token at the same position. A `mask` is 1 on the tokens of an answer, and 0 on prompts and padding, which have no
effect. A sequence without an answer adds nothing to a loss; a loss of only such sequences is 0.

With :math:`l_{i,t} = -\log p(y_{i,t} \mid y_{i,<t})`, an answer has the loss :math:`L_i = \sum_t m_{i,t} l_{i,t}` and
the length :math:`|y_i| = \sum_t m_{i,t}`. Token losses are means over the tokens of all answers, answer losses are
means over answers. Everything is minimised, and computed in float32 at least.

Gradient difference (Liu et al. 2022, arXiv 2203.12817) is not a loss of its own here: it is `gradient_ascent` as the
forget loss with `token_mean` as the retain loss.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from eupmu_jax.objectives._logits import kl_of_logits, promoted


class Answers(NamedTuple):
    """Answers, and how likely a reference model finds them.

    Attributes:
      nll: Loss of each token, `(n, T)`.
      mask: Which tokens are the answer, `(n, T)`.
      reference_nll: `sequence_nll` of the reference model, `(n,)`; a constant of the differentiation.
    """

    nll: chex.Array
    mask: chex.Array
    reference_nll: chex.Array


def token_nll(logits: chex.Array, targets: chex.Array) -> jax.Array:
    """-log p of each token, `(n, T)`, from logits `(n, T, V)` and int targets `(n, T)`.

    >>> bool(jnp.allclose(token_nll(jnp.zeros((1, 2, 4)), jnp.array([[3, 0]])), jnp.log(4)))
    True
    """
    return optax.softmax_cross_entropy_with_integer_labels(promoted(logits), targets)


def answer_lengths(mask: chex.Array) -> jax.Array:
    """Tokens of each answer, `(n,)`, as floats.

    >>> answer_lengths(jnp.array([[0, 1, 1], [0, 0, 0]])).tolist()
    [2.0, 0.0]
    """
    return jnp.sum(mask.astype(bool), axis=-1, dtype=jnp.float32)


def sequence_nll(nll: chex.Array, mask: chex.Array) -> jax.Array:
    """L, the loss of each answer, `(n,)`: a sum over its tokens, 0 without any.

    >>> sequence_nll(jnp.array([[9.0, 1.0, 2.0]]), jnp.array([[0, 1, 1]])).tolist()
    [3.0]
    """
    _check("mask", mask, nll.shape, "that of nll")
    return jnp.sum(_answered(nll, mask), axis=-1)


def token_mean(values: chex.Array, mask: chex.Array) -> jax.Array:
    r"""Mean over the tokens of all answers; of `nll`, the retain loss.

    .. math:: l = \sum_{i,t} m_{i,t} l_{i,t} \Big/ \sum_{i,t} m_{i,t}

    >>> token_mean(jnp.array([[9.0, 1.0, 2.0]]), jnp.array([[0, 1, 1]])).tolist()
    1.5
    """
    return jnp.sum(sequence_nll(values, mask)) / jnp.maximum(jnp.sum(answer_lengths(mask)), 1)


def gradient_ascent(nll: chex.Array, mask: chex.Array) -> jax.Array:
    """-`token_mean`, which has no lower bound (Jang et al. 2023, arXiv 2210.01504). Negative, so not for log scale.

    >>> gradient_ascent(jnp.array([[9.0, 1.0, 2.0]]), jnp.array([[0, 1, 1]])).tolist()
    -1.5
    """
    return -token_mean(nll, mask)


def wga(nll: chex.Array, mask: chex.Array, beta: float = 1.0) -> jax.Array:
    r"""Weighted gradient ascent, which leaves forgotten tokens alone (Wang et al. 2025, arXiv 2502.19301).

    .. math:: -\operatorname{mean}_{i,t}\, p_{i,t}^\beta\, l_{i,t}, \quad p = e^{-l}

    with weights that are not differentiated. With beta = 0 it is `gradient_ascent`. Negative, so not for log scale.

    >>> round(float(wga(jnp.log(jnp.array([[2.0, 4.0]])), jnp.ones((1, 2)))), 4)
    -0.3466
    """
    nll = _answered(nll, mask)
    return -token_mean(_weighted(jnp.exp(-beta * jax.lax.stop_gradient(nll)), nll), mask)


def satimp(nll: chex.Array, mask: chex.Array, beta1: float = 5.0, beta2: float = 1.0) -> jax.Array:
    r"""Ascent weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

    .. math:: -\operatorname{mean}_{i,t}\, p_{i,t}^{\beta_1} (1 - p_{i,t})^{\beta_2}\, l_{i,t}, \quad p = e^{-l}

    with weights that are not differentiated. Negative, so not for log scale.

    >>> round(float(satimp(jnp.log(jnp.array([[2.0, 4.0]])), jnp.ones((1, 2)), beta1=1.0)), 4)
    -0.2166
    """
    nll = _answered(nll, mask)
    fixed = jax.lax.stop_gradient(nll)
    return -token_mean(_weighted(jnp.exp(-beta1 * fixed) * (-jnp.expm1(-fixed)) ** beta2, nll), mask)


def _weighted(weights, nll):
    """Losses times weights; a weight of 0 leaves a token alone even where its loss is infinite."""
    nothing = weights == 0
    return jnp.where(nothing, 0, weights * jnp.where(nothing, 0, nll))


def kl_to_reference(logits: chex.Array, reference_logits: chex.Array, mask: chex.Array) -> jax.Array:
    r"""Mean over the tokens of answers of KL(reference || model); the reference is fixed.

    A retain loss: with `gradient_ascent` it makes the KL minimisation of TOFU (Maini et al. 2024, arXiv 2401.06121).
    It is 0 at the reference, so not for log scale there. Where the reference's logit is minus infinity, as in a padded
    vocabulary, the term is 0.

    >>> kl_to_reference(jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3)), jnp.ones((1, 2))).tolist()
    0.0
    """
    _check("reference_logits", reference_logits, logits.shape, "that of logits")
    return token_mean(kl_of_logits(jax.lax.stop_gradient(promoted(reference_logits)), promoted(logits)), mask)


def undial(
    logits: chex.Array, reference_logits: chex.Array, targets: chex.Array, mask: chex.Array, beta: float = 10.0
) -> jax.Array:
    r"""Self-distillation with the true token suppressed (Dong et al., NAACL 2025, arXiv 2402.10052).

    .. math:: \operatorname{mean}_{i,t}\; H\left(\mathrm{softmax}(z^0_{i,t} - \beta\, e_{y_{i,t}}),\;
              \mathrm{softmax}(z_{i,t})\right)

    with H the cross-entropy, :math:`z^0` the fixed logits of the reference and e a one-hot vector. With beta = 0 the
    gradient vanishes at the reference.

    >>> round(float(undial(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4)), jnp.array([[2]]), jnp.ones((1, 1)))), 4)
    1.3863
    """
    _check("reference_logits", reference_logits, logits.shape, "that of logits")
    _check("targets", targets, logits.shape[:-1], "that of logits without the vocabulary")
    logits, reference = promoted(logits), jax.lax.stop_gradient(promoted(reference_logits))
    true = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    wanted = jax.nn.softmax(reference - beta * true)
    # A token that neither model can say, as in a padded vocabulary, would be 0 times infinity.
    possible = ~(jnp.isneginf(logits) & jnp.isneginf(reference))
    return token_mean(optax.softmax_cross_entropy(logits, wanted, where=possible), mask)


def npo(answers: Answers, beta: float = 0.1) -> jax.Array:
    r"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    .. math:: -\frac2\beta \operatorname{mean}_i \log \sigma\left(\beta (L_i - L^0_i)\right)

    with :math:`L^0` that of the reference. Positive, and 0 only for an answer that has become impossible. As beta tends
    to 0 its gradient tends to that of ascent on L.

    >>> round(float(npo(Answers(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.array([3.0])))), 4)
    13.8629
    """
    return -2 / beta * _answer_mean(jax.nn.log_sigmoid(-beta * _log_ratios(answers)), answers.mask)


def simnpo(nll: chex.Array, mask: chex.Array, beta: float = 2.5, delta: float = 0.0) -> jax.Array:
    r"""NPO on the mean token loss, without a reference (Fan et al. 2024, arXiv 2410.07163).

    .. math:: -\frac2\beta \operatorname{mean}_i \log \sigma\left(\beta (L_i / |y_i| - \delta)\right)

    The paper's gamma is beta times delta. The default of beta is that of the paper's code for TOFU; 4.5 is common too.
    Positive.

    >>> round(float(simnpo(jnp.zeros((1, 3)), jnp.ones((1, 3)))), 4)
    0.5545
    """
    means = sequence_nll(nll, mask) / jnp.maximum(answer_lengths(mask), 1)
    return -2 / beta * _answer_mean(jax.nn.log_sigmoid(beta * (means - delta)), mask)


def dpo(forget: Answers, alternative: Answers, beta: float = 0.1) -> jax.Array:
    r"""Prefers an alternative answer, such as "I don't know", to the true one (IdkDPO; Maini et al. 2024).

    .. math:: -\frac2\beta \operatorname{mean}_i \log \sigma(\beta \rho_i), \quad
              \rho_i = (L^0_i - L_i)(\text{alternative}) - (L^0_i - L_i)(\text{forget})

    The factor 2 / beta, which DPO itself lacks (Rafailov et al. 2023, arXiv 2305.18290, equation 7), brings it to the
    scale of `npo`. A pair counts if both answers have tokens. Positive.

    >>> same = Answers(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.array([3.0]))
    >>> round(float(dpo(same, same, beta=2.0)), 4)
    0.6931
    """
    return (
        -2
        / beta
        * _answer_mean(jax.nn.log_sigmoid(beta * _preferences(forget, alternative)), *_masks(forget, alternative))
    )


def lrml(forget: Answers, alternative: Answers, beta: float = 0.05, tau: float = 0.05) -> jax.Array:
    r"""DiscoPOP's loss: logistic where the alternative is not preferred, exponential where it is.

    .. math:: \operatorname{mean}_i\; (1 - s_i) \left(-\log \sigma(x_i)\right) + s_i e^{-x_i}, \quad
              x_i = \beta \rho_i, \quad s_i = \sigma(x_i / \tau)

    with rho of `dpo` (Lu et al. 2024, arXiv 2406.08414, equation 5). This follows the authors' code, whose modulator is
    sigmoid(rho) for any beta, as here with tau = beta; equation 27 of the paper has another exponential. Positive, and
    not convex near x = 0. Finite for every x if tau < 1.

    >>> same = Answers(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.array([3.0]))
    >>> round(float(lrml(same, same)), 4)
    0.8466
    """
    x = beta * _preferences(forget, alternative)
    # One exponential for s exp(-x), whose factors alone may overflow or vanish.
    exponential = jnp.exp(jax.nn.log_sigmoid(x / tau) - x)
    values = exponential - jax.nn.sigmoid(-x / tau) * jax.nn.log_sigmoid(x)
    return _answer_mean(values, *_masks(forget, alternative))


def control_vector(key: chex.PRNGKey, size: int, steering: float = 6.5) -> jax.Array:
    r"""The target of `rmu`, :math:`c\,u`, `(size,)`: u of norm 1, its entries drawn from [0, 1) (Li et al. 2024).

    >>> vector = control_vector(jax.random.key(0), 64)
    >>> round(float(jnp.linalg.norm(vector)), 3), bool(jnp.all(vector >= 0))
    (6.5, True)
    """
    drawn = jax.random.uniform(key, (size,))
    return steering * drawn / jnp.linalg.norm(drawn)


def rmu(hidden: chex.Array, target: chex.Array, mask: chex.Array) -> jax.Array:
    r"""Representation misdirection (Li et al. 2024, arXiv 2403.03218, section 4).

    .. math:: \operatorname{mean}_i \frac1{|y_i|} \sum_t m_{i,t}\, \lVert h_{i,t} - v_{i,t} \rVert^2 / d

    of hidden states h at one layer. To forget, v is a `control_vector`; to retain, it is the reference's hidden states.
    Each answer is divided by its own length, so its weight does not depend on the others in its batch.

    Args:
      hidden: `(n, T, d)`.
      target: `(d,)` or `(n, T, d)`; a constant of the differentiation.
      mask: `(n, T)`.

    >>> rmu(jnp.ones((1, 2, 4)), jnp.zeros(4), jnp.ones((1, 2))).tolist()
    1.0
    """
    if target.shape != hidden.shape[-1:]:
        _check("target", target, hidden.shape, f"{hidden.shape[-1:]} or that of hidden")
    distances = jnp.mean(jnp.square(promoted(hidden) - jax.lax.stop_gradient(promoted(target))), axis=-1)
    return _answer_mean(sequence_nll(distances, mask) / jnp.maximum(answer_lengths(mask), 1), mask)


def _answered(nll, mask):
    """Losses with 0 where there is no answer: on padding they may be infinite, and 0 times that is NaN."""
    return jnp.where(mask.astype(bool), promoted(nll), 0)


def _check(name, value, shape, meaning):
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {value.shape}, expected {meaning}, {shape}")


def _answer_mean(values, *masks):
    """Mean over the sequences that have an answer in all masks."""
    present = jnp.all(jnp.stack([jnp.any(mask.astype(bool), axis=-1) for mask in masks]), axis=0)
    return jnp.sum(jnp.where(present, values, 0)) / jnp.maximum(jnp.sum(present), 1)


def _log_ratios(answers):
    """Log ratios of the model to the reference, log p(y) - log p0(y)."""
    _check("reference_nll", answers.reference_nll, answers.nll.shape[:1], "one number for each sequence")
    return jax.lax.stop_gradient(promoted(answers.reference_nll)) - sequence_nll(answers.nll, answers.mask)


def _preferences(forget, alternative):
    return _log_ratios(alternative) - _log_ratios(forget)


def _masks(forget, alternative):
    return forget.mask, alternative.mask
