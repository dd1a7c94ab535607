"""Losses of `tasks.language`: functions of a model's outputs and a batch, which may lack what they need."""

import functools
import inspect
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax.objectives import language as losses
from eupmu_jax.objectives._logits import promoted
from eupmu_jax.tasks.task import drawn

# Seed of RMU's control vector, so that every step and every run pushes in the same direction.
DIRECTION = 0
# Constants that a loss divides by.
POSITIVE = {("npo", "beta"), ("simnpo", "beta"), ("dpo", "beta"), ("lrml", "beta"), ("lrml", "tau")}
# Exponents of probabilities: if negative, a wrong answer would have an infinite weight.
NOT_NEGATIVE = {("wga", "beta"), ("satimp", "beta1"), ("satimp", "beta2")}


def as_dict(outputs):
    return outputs if isinstance(outputs, dict) else {"logits": outputs}


def logits_of(outputs):
    return as_dict(outputs)["logits"]


def mask_of(batch, prefix=""):
    tokens, name = batch[f"{prefix}tokens"], f"{prefix}mask"
    if name not in batch:
        return jnp.ones((tokens.shape[0], tokens.shape[1] - 1), bool)
    if batch[name].shape != tokens.shape:
        raise ValueError(f"{name}: got shape {batch[name].shape}, expected that of {prefix}tokens, {tokens.shape}")
    return batch[name][:, 1:].astype(bool)


def nll_of(outputs, batch, prefix=""):
    return losses.token_nll(as_dict(outputs)[f"{prefix}logits"], batch[f"{prefix}tokens"][:, 1:])


def _needed(loss, name, outputs, batch):
    """A value of the original model, from the batch or from the outputs of a task that has its parameters."""
    if name in batch:
        return batch[name]
    if isinstance(outputs, dict) and name in outputs:
        return outputs[name]
    raise ValueError(
        f"batch: got {', '.join(batch)}, but {loss} needs {name}; expected a batch from tasks.with_reference, or a "
        "task with the original parameters, tasks.language(apply, original=params)"
    )


def _hidden(outputs):
    if isinstance(outputs, dict) and "hidden" in outputs:
        return outputs["hidden"]
    raise ValueError("hidden: got None, but rmu needs it; expected tasks.language(apply, hidden=hidden)")


def _answers(loss, outputs, batch, prefix=""):
    nll, mask = nll_of(outputs, batch, prefix), mask_of(batch, prefix)
    name = f"reference_{prefix}nll"
    if name not in batch and isinstance(outputs, dict) and f"reference_{prefix}logits" in outputs:
        reference = losses.token_nll(outputs[f"reference_{prefix}logits"], batch[f"{prefix}tokens"][:, 1:])
        return losses.Answers(nll, mask, losses.sequence_nll(reference, mask))
    return losses.Answers(nll, mask, _needed(loss, name, outputs, batch))


def _pairs(loss, outputs, batch):
    if "alternative_tokens" not in batch:
        raise ValueError(
            f"batch: got {', '.join(batch)}, but {loss} needs alternative_tokens; expected the prompt with another "
            "answer for each sequence, (n, length), and optionally alternative_mask"
        )
    return _answers(loss, outputs, batch), _answers(loss, outputs, batch, "alternative_")


def _cross_entropy(outputs, batch):
    return losses.token_mean(nll_of(outputs, batch), mask_of(batch))


def _kl(outputs, batch):
    reference = _needed("retain='kl'", "reference_logits", outputs, batch)
    return losses.kl_to_reference(logits_of(outputs), reference, mask_of(batch))


def _still(outputs, batch):
    reference = _needed("retain='rmu'", "reference_hidden", outputs, batch)
    return losses.rmu(_hidden(outputs), reference, mask_of(batch))


def _bounded_ascent(outputs, batch):
    limit = jnp.log(logits_of(outputs).shape[-1])
    return losses.token_mean(jnp.maximum(limit - nll_of(outputs, batch), 0), mask_of(batch))


def _random_labels(outputs, batch):
    vocabulary = logits_of(outputs).shape[-1]
    shift = 1 + (drawn(batch)[:, 1:] * (vocabulary - 1)).astype(jnp.int32) % (vocabulary - 1)
    others = (batch["tokens"][:, 1:] + shift) % vocabulary
    nll = losses.token_nll(logits_of(outputs), others)
    # A padded vocabulary has tokens that can never occur.
    return losses.token_mean(jnp.where(jnp.isposinf(nll), 0, nll), mask_of(batch))


def _kl_to_uniform(outputs, batch):
    logits = promoted(logits_of(outputs))
    possible = ~jnp.isneginf(logits)
    count = jnp.sum(possible, axis=-1)
    mean = jnp.sum(jnp.where(possible, jax.nn.log_softmax(logits), 0), axis=-1) / count
    return losses.token_mean(-mean - jnp.log(count), mask_of(batch))


def _gradient_ascent(outputs, batch):
    return losses.gradient_ascent(nll_of(outputs, batch), mask_of(batch))


def _npo(outputs, batch, **constants):
    return losses.npo(_answers("npo", outputs, batch), **constants)


def _simnpo(outputs, batch, **constants):
    return losses.simnpo(nll_of(outputs, batch), mask_of(batch), **constants)


def _dpo(outputs, batch, **constants):
    return losses.dpo(*_pairs("dpo", outputs, batch), **constants)


def _lrml(outputs, batch, **constants):
    return losses.lrml(*_pairs("lrml", outputs, batch), **constants)


def _wga(outputs, batch, **constants):
    return losses.wga(nll_of(outputs, batch), mask_of(batch), **constants)


def _satimp(outputs, batch, **constants):
    return losses.satimp(nll_of(outputs, batch), mask_of(batch), **constants)


def _undial(outputs, batch, **constants):
    reference = _needed("undial", "reference_logits", outputs, batch)
    return losses.undial(logits_of(outputs), reference, batch["tokens"][:, 1:], mask_of(batch), **constants)


def _rmu(outputs, batch, **constants):
    hidden = _hidden(outputs)
    target = losses.control_vector(jax.random.key(DIRECTION), hidden.shape[-1], **constants)
    return losses.rmu(hidden, target, mask_of(batch))


def _share_not_predicted(outputs, batch):
    mask = mask_of(batch)
    wrong = (jnp.argmax(logits_of(outputs), axis=-1) != batch["tokens"][:, 1:]) & mask
    return jnp.sum(wrong, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _improbability(outputs, batch):
    mask = mask_of(batch)
    return -jnp.expm1(-losses.sequence_nll(nll_of(outputs, batch), mask) / jnp.maximum(losses.answer_lengths(mask), 1))


ERROR = {"tokens": _share_not_predicted, "probability": _improbability}

RETAIN = {"cross_entropy": _cross_entropy, "kl": _kl, "rmu": _still}

# One object for all tasks, so that tasks from equal arguments are equal.
FORGET = {
    "bounded_ascent": _bounded_ascent,
    "random_labels": _random_labels,
    "kl_to_uniform": _kl_to_uniform,
    "gradient_ascent": _gradient_ascent,
    "npo": _npo,
    "simnpo": _simnpo,
    "dpo": _dpo,
    "lrml": _lrml,
    "wga": _wga,
    "satimp": _satimp,
    "undial": _undial,
    "rmu": _rmu,
}


# Functions whose arguments with a default are the constants of a forget loss.
OBJECTIVES = {
    "npo": losses.npo,
    "simnpo": losses.simnpo,
    "dpo": losses.dpo,
    "lrml": losses.lrml,
    "wga": losses.wga,
    "satimp": losses.satimp,
    "undial": losses.undial,
    "rmu": losses.control_vector,
}


def with_constants(constants):
    """The forget losses with these constants."""
    if not isinstance(constants, Mapping):
        raise ValueError(f"constants: got {constants!r}, expected a dict of dicts by loss and name")
    for name, given in constants.items():
        if name not in FORGET:
            raise ValueError(f"constants: got {name!r}, expected one of {', '.join(FORGET)}")
        if not isinstance(given, Mapping):
            raise ValueError(f"constants[{name!r}]: got {given!r}, expected a dict of numbers by name")
        known = _constants_of(OBJECTIVES[name]) if name in OBJECTIVES else []
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"constants[{name!r}]: got {', '.join(unknown)}, expected {' or '.join(known) or 'none'}")
        for key, value in given.items():
            positive, exponent = (name, key) in POSITIVE, (name, key) in NOT_NEGATIVE
            if not _is_number(value) or (positive and value <= 0) or (exponent and value < 0):
                wanted = "a number above 0" if positive else "a number of at least 0" if exponent else "a finite number"
                raise ValueError(f"constants[{name!r}][{key!r}]: got {value!r}, expected {wanted}")
    as_floats = lambda given: tuple(sorted((key, float(value)) for key, value in given.items()))
    return {name: _with(name, as_floats(constants.get(name, {}))) for name in FORGET}


def _constants_of(objective):
    parameters = inspect.signature(objective).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _is_number(value):
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array))


@functools.lru_cache(maxsize=64)
def _with(name, given):
    """One object for equal constants, so that equal tasks are equal."""
    return functools.partial(FORGET[name], **dict(given)) if given else FORGET[name]
