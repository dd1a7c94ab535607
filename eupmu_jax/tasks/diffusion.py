"""Conditional diffusion models as tasks: batches are dicts of `inputs`, images in [-1, 1], and int `labels`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.algebra import is_finite
from eupmu_jax._stack.checks import check_int, check_number, check_same_shapes
from eupmu_jax._stack.parts import in_parts
from eupmu_jax.objectives import diffusion as objectives
from eupmu_jax.tasks._constants import check_constants
from eupmu_jax.tasks.examples import ROUNDED, check_images, check_labels
from eupmu_jax.tasks.task import Task, check_function

# Seed of evaluation, so that two models are compared on the same noise at the same times.
FIXED = 0
# The most conditions that stand for all others.
OTHERS = 16


def diffusion(
    denoise: Callable[[Any, Any, Any, Any], Any],
    schedule: objectives.Schedule,
    *,
    num_conditions: int,
    prediction: objectives.Prediction = "v",
    original: chex.ArrayTree | None = None,
    dropout: float = 0.1,
    gamma: float | None = None,
    guidance: float = 1.0,
    fresh_params: Callable[[chex.PRNGKey], Any] | None = None,
    bounded: bool = True,
) -> Task:
    r"""The task of a diffusion model with classes or words as conditions; its retain loss is the denoising loss.

    .. math:: l = \frac1n \sum_i w(t_i)\, \lVert f(x_{t_i}, t_i, c_i) - y_i \rVert^2 / d

    with d numbers in an image. Times are stratified; times and noise depend only on the key and the batch size, so that
    two models, or one before and after a step, can be compared on the same draw. Batches of different sizes get
    different times, so forget and retain rows share them only if both batches have the same size. Evaluation, which has
    no key, always uses the same draw: on other noise a small rise would not show. A share of the conditions is dropped
    in training; these examples count in the retain loss alone.

    Forget losses: each is a mean squared error over the examples i whose condition was kept,

    .. math:: l_f = \frac{1}{n d} \sum_i \lVert f(x_{t_i}, t_i, c_i) - y_i \rVert^2

    of the prediction for the forgotten condition against:

    - `negative_guidance`: see `objectives.diffusion.negative_guidance` (ESD). If a share p of all images that x_t may
      have come from belongs to the class, guidance p / (1 - p) gives the prediction for the others together;
    - `random_condition`: the prediction for another condition, drawn anew for each example, :math:`y_i = f_0(x_t, c')`
      with :math:`c'` uniform over all but :math:`c_i`; its minimum is the mean prediction for all others;
    - `unconditional`: the prediction without a condition, :math:`y_i = f_0(x_t, \varnothing)`;
    - `other_condition`: that for the next one, :math:`y_i = f_0(x_t, (c_i + 1) \bmod K)` with K conditions (SalUn, Fan
      et al., arXiv 2310.12508);

    or of another quantity:

    - `noise`: the noise :math:`\epsilon_i` that the prediction implies (`objectives.diffusion.epsilon_of`), against
      uniform noise in place of the Gaussian, :math:`\lVert \epsilon_i - u_i \rVert^2` with :math:`u_i \sim U[0, 1]^d`
      (EraseDiff, Wu et al., arXiv 2401.05779);
    - `surrogate`: the denoising loss of images of uniform noise, :math:`x'_i \sim U[-1, 1]^d`, for all examples and
      without weights, :math:`\lVert f(x'_{t_i}, t_i, c_i) - y'_i \rVert^2` (Selective Amnesia, Heng & Soh, arXiv
      2305.10120);
    - `bounded_ascent`: ascent on the denoising loss without weights until it equals that of predicting 0, the mean
      square of its target, :math:`\max(0, \lVert y_i \rVert^2 - \lVert f(x_{t_i}, t_i, c_i) - y_i \rVert^2)`.

    Conditions that are not classes, such as embedded prompts, are the rows of a table that `denoise` looks up by label:
    a part of `params` that stays `frozen`, so that `diffusion_attacks` can retrain a row of it.

    :math:`f_0` is the original model if it is given, else the model itself; no gradient flows through it. Pass it
    when unlearning: otherwise the targets of the first four losses move with the model, negative guidance of any
    strength leads no further than to the prediction without a condition, and EUPMU may stop short of its target, far
    from its limit.

    A condition is forgotten entirely when the model predicts its images no better than the mean of its predictions for
    the other conditions does. Without held-out data, EUPMU forgets to that level:

    .. math:: e_i = \frac{w(t_i)}d \Big\lVert \frac1{|C|} \sum_{c' \in C} f(x_{t_i}, t_i, c') - y_i \Big\rVert^2

    with C all other conditions, or 16 spread over them. That level is too low if a noised image itself shows what it is
    and the condition adds next to nothing, since a model that never saw such images is worse at them under any
    condition. EUPMU's setting `target` sets another level.

    Args:
      denoise: `denoise(params, x_t, t, labels) -> prediction` like `x_t`; `t` are ints `(n,)` in [0, T), `labels` ints
        in [0, num_conditions], of which the last stands for no condition. `x_t` is in float32 even for images in
        bfloat16; a model that computes in bfloat16 has to cast it.
      schedule: From `objectives.diffusion`.
      num_conditions: At least 2, not counting the label for no condition.
      prediction: What the model predicts: "epsilon", "v" or "x".
      original: Parameters of the original model, a constant of which every compiled program holds a copy. For a large
        model, set JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 in the environment, so that JAX passes it as an argument.
      dropout: Share of the conditions dropped in training.
      gamma: Of `min_snr_weights`; None weights all times equally.
      guidance: Of `negative_guidance`.
      fresh_params: `fresh_params(key)`: untrained parameters.
      bounded: Whether images lie in [-1, 1]; latents do not. Images in [0, 1] pass too, although a model that was
        trained on [-1, 1] does worse on them; give those that it was trained on.

    Returns:
      The task. Its error is the denoising loss of each example, which is not a rate. So `allowed_error` of `unlearn` is
      an absolute rise of that loss: 0.01 allows 5 % where the loss is 0.2, and a doubling where it is 0.01.

    Raises:
      ValueError: If `denoise` is not a function, for fewer than two conditions, an unknown prediction, a schedule that
        does not fit it, a dropout outside [0, 1), a gamma that is not finite and above 0, a guidance that is not
        finite, or an `original` with numbers that are not. `unlearn` refuses images outside [-1, 1] if they are
        bounded, any that are not finite, labels that stand neither for a condition nor for none, a model that predicts
        NaN for no condition, as `nnx.Embed` does beyond its table, and an `original` whose structure or shapes differ
        from the parameters'. A table that is indexed repeats its last row there, which cannot be detected.

    >>> from eupmu_jax.objectives.diffusion import cosine_schedule
    >>> schedule = cosine_schedule(10)
    >>> task = diffusion(lambda params, x_t, t, labels: params * x_t, schedule, num_conditions=2, prediction="epsilon")
    >>> batch = {"inputs": jnp.zeros((4, 8)), "labels": jnp.zeros(4, int)}
    >>> outputs = task.outputs(1.0, batch, None)
    >>> bool(task.retain(outputs, batch) > 0), task.error(outputs, batch).shape
    (True, (4,))
    """
    check_function("denoise", denoise, "a function (params, x_t, t, labels) -> prediction", 4)
    check_int("num_conditions", num_conditions, 2, static=True)
    if fresh_params is not None:
        check_function("fresh_params", fresh_params, "a function of a key, or None", 1)
    objectives.check_fit(prediction, schedule)
    for name, value in (("dropout", dropout), ("gamma", gamma or 1.0), ("guidance", guidance)):
        check_number(name, value, finite=name != "dropout")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, expected a share in [0, 1)")
    if gamma is not None and not gamma > 0:
        raise ValueError(f"gamma: got {gamma}, expected a number above 0, or None for equal weights")
    dropout = float(dropout)
    check_constants("original", original)
    # The model is called for many targets, of which a step uses one: traced once, the others cost next to nothing.
    denoise = jax.jit(denoise)

    def noised(x, key):
        """Images at random times, the times, what a perfect model would predict, and the weights of the errors."""
        times, noises = jax.random.split(key)
        t = objectives.stratified_times(times, len(x), schedule.steps)
        noise = jax.random.normal(noises, x.shape, x.dtype)
        weights = jnp.ones(len(x)) if gamma is None else objectives.min_snr_weights(prediction, schedule, t, gamma)
        wanted = objectives.target(prediction, schedule, x, t, noise)
        return objectives.noised(schedule, x, t, noise), t, wanted, weights

    def outputs(params, batch, key):
        x, labels = batch["inputs"], _wide(batch["labels"])
        first = jax.random.key(FIXED) if key is None else key
        # A step's batch fits at once; an evaluated set may not, and its noise is drawn for all of it together.
        predict = denoise if key is not None else functools.partial(in_parts, denoise)
        keys = jax.random.split(jax.random.fold_in(first, 1), 4)
        left_out = jnp.zeros(len(x), bool) if key is None else jax.random.bernoulli(keys[0], dropout, (len(x),))
        x_t, t, wanted, weights = noised(x, first)
        nothing = jnp.full_like(labels, num_conditions)
        teacher = jax.lax.stop_gradient(params if original is None else original)
        images = jax.random.uniform(keys[1], x.shape, x.dtype, -1, 1)
        surrogate_t, _, surrogate, _ = noised(images, first)
        flat = jax.random.uniform(keys[2], x.shape, x.dtype)
        random = (labels + jax.random.randint(keys[3], labels.shape, 1, num_conditions)) % num_conditions
        unconditional, conditional = (predict(teacher, x_t, t, c) for c in (nothing, labels))
        predicted = predict(params, x_t, t, jnp.where(left_out, nothing, labels))
        objectives.check_prediction(predicted, x_t)
        return {
            "prediction": predicted,
            "target": wanted,
            "weights": weights,
            "counts": 1.0 - left_out,
            "unconditional": unconditional,
            "random_condition": predict(teacher, x_t, t, random),
            "other_condition": predict(teacher, x_t, t, (labels + 1) % num_conditions),
            "negative_guidance": objectives.negative_guidance(conditional, unconditional, guidance),
            "noise": flat,
            "predicted_noise": objectives.epsilon_of(prediction, schedule, predicted, x_t, t),
            "surrogate_prediction": predict(params, surrogate_t, t, labels),
            "surrogate": surrogate,
        }

    def unknown(params, batch):
        x, labels = batch["inputs"], _wide(batch["labels"])
        x_t, t, wanted, weights = noised(x, jax.random.key(FIXED))
        offsets = np.unique(np.linspace(1, num_conditions - 1, min(OTHERS, num_conditions - 1)).astype(int))
        predict = functools.partial(in_parts, denoise)
        mean = sum(predict(params, x_t, t, (labels + offset) % num_conditions) for offset in offsets) / len(offsets)
        return weights * objectives.squared_errors(mean, wanted), len(offsets)

    def check(batch):
        if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch) or np.ndim(batch["labels"]) != 1:
            shapes = jax.tree.map(np.shape, batch)
            raise ValueError(f"batch: got shapes {shapes}, expected a dict with inputs (n, ...) and labels (n,)")
        check_labels(batch["labels"], num_conditions + 1)
        if not jnp.issubdtype(jnp.result_type(batch["inputs"]), jnp.floating):
            raise ValueError(f"inputs: got {jnp.result_type(batch['inputs'])}, expected floating point numbers")
        otherwise = ", or for latents a task with bounded=False"
        check_images("inputs", batch["inputs"], ROUNDED if bounded else None, otherwise)

    def check_model(params, batch):
        if original is not None:
            check_same_shapes("original", original, "params", params)
        seen_here = all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(params))
        if not dropout or not seen_here:
            # If no condition is ever dropped, a model without a label for none will do for all that needs none.
            return
        x, nothing = jnp.asarray(batch["inputs"][:1]), jnp.full(1, num_conditions, jnp.int32)
        x_t, t, _, _ = noised(x, jax.random.key(FIXED))
        known = denoise(params, x_t, t, _wide(jnp.asarray(batch["labels"][:1])))
        if is_finite(known) and not is_finite(denoise(params, x_t, t, nothing)):
            raise ValueError(
                f"num_conditions: got {num_conditions}, but for label {num_conditions}, which stands for no condition, "
                "the model predicts numbers that are not finite; expected the number of its real conditions"
            )

    return Task(
        outputs=outputs,
        retain=_denoising,
        forget=FORGET,
        divergence=lambda ours, teacher: jnp.mean(jnp.square(ours["prediction"] - teacher["prediction"])),
        error=_errors_of_conditions,
        fresh_params=fresh_params,
        unknown=unknown,
        check=check,
        check_model=check_model,
    )


def _wide(labels):
    """Labels in int32 at least: in uint8, that of no condition, or the next one, may wrap around."""
    return labels.astype(jnp.promote_types(labels.dtype, jnp.int32))


def _errors(outputs, batch):
    return outputs["weights"] * objectives.squared_errors(outputs["prediction"], outputs["target"])


def _errors_of_conditions(outputs, batch):
    """Where a condition was dropped, the mean error of the others: no limit is measured without conditions."""
    errors, counts = _errors(outputs, batch), outputs["counts"]
    return jnp.where((counts > 0) | (jnp.sum(counts) == 0), errors, _mean(errors, outputs))


def _denoising(outputs, batch):
    return jnp.mean(_errors(outputs, batch))


def _mean(values, outputs):
    """Mean over the examples whose condition was kept."""
    return jnp.sum(values * outputs["counts"]) / jnp.maximum(jnp.sum(outputs["counts"]), 1)


def _towards(name, of="prediction"):
    def loss(outputs, batch):
        return _mean(objectives.squared_errors(outputs[of], outputs[name]), outputs)

    return loss


def _surrogate(outputs, batch):
    return jnp.mean(objectives.squared_errors(outputs["surrogate_prediction"], outputs["surrogate"]))


def _bounded_ascent(outputs, batch):
    bound = objectives.squared_errors(jnp.zeros_like(outputs["target"]), outputs["target"])
    found = objectives.squared_errors(outputs["prediction"], outputs["target"])
    return _mean(jnp.maximum(bound - found, 0), outputs)


FORGET = {
    "negative_guidance": _towards("negative_guidance"),
    "random_condition": _towards("random_condition"),
    "unconditional": _towards("unconditional"),
    "other_condition": _towards("other_condition"),
    "noise": _towards("noise", of="predicted_noise"),
    "surrogate": _surrogate,
    "bounded_ascent": _bounded_ascent,
}
