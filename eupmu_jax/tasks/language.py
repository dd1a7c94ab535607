"""Token prediction as a task: batches are dicts of `tokens`, ints `(n, length)`, and optionally `mask` and more."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from eupmu_jax._stack.checks import check_int, check_same_shapes
from eupmu_jax.objectives import language as losses
from eupmu_jax.objectives import sequence_log_odds
from eupmu_jax.tasks._constants import check_constants
from eupmu_jax.tasks._language_losses import (
    ERROR,
    FORGET,
    RETAIN,
    as_dict,
    logits_of,
    mask_of,
    nll_of,
    with_constants,
)
from eupmu_jax.tasks.task import Task, check_function

# A ragged list of sequences, or a column that is missing.
NOT_ARRAYS = (list, tuple, type(None))


def language(
    apply: Callable[[Any, Any], Any],
    *,
    hidden: Callable[[Any, Any], Any] | None = None,
    original: chex.ArrayTree | None = None,
    retain: str = "cross_entropy",
    error: str = "tokens",
    constants: Mapping[str, Mapping[str, float]] | None = None,
    fresh_params: Callable[[chex.PRNGKey], Any] | None = None,
) -> Task:
    r"""The task of a causal language model, with the mean loss of the next token as its retain loss.

    .. math:: l = \frac{\sum_{i, t} m_{i, t}\, (-\log p(x_{i, t} \mid x_{i, < t}))}{\sum_{i, t} m_{i, t}}, \quad t \ge 1

    Forget losses that need nothing but `tokens`: `bounded_ascent` (leaves a token alone once its loss has reached that
    of a uniform guess, ln V), `random_labels` (other tokens, drawn anew in every pass over the forget set),
    `kl_to_uniform`, `gradient_ascent`, `wga`, `satimp` and `simnpo`. Others compare with the original model, `dpo` and
    `lrml` also with an alternative answer to the same prompt, and `rmu` with a fixed vector. Formulas are in
    `objectives.language`; those of the first three, applied here to each token, are in `objectives`.

    ============= =================================================================================
    forget loss   needs
    ============= =================================================================================
    `npo`         `reference_nll`
    `dpo`, `lrml` `reference_nll`, `alternative_tokens`, `reference_alternative_nll`
    `undial`      `reference_logits`
    `rmu`         `hidden`
    ============= =================================================================================

    The retain loss may be `"kl"`, the KL divergence from the original model (`reference_logits`), or `"rmu"`, the
    distance of the hidden states from the original's (`hidden` and `reference_hidden`). Both are 0 at the original
    model, so not for log scale.

    Values whose names start with `reference_` are read from the batch, where `with_reference` puts them, or else
    computed from `original` in each step. A step computes only what its losses use.

    The divergence is the mean of KL(teacher || model) over the tokens that are predicted. The error of a sequence is
    the share of its tokens that the model would not have predicted, that is, 1 minus its exact memorisation. With
    `error="probability"` it is 1 minus its length-normalised probability, :math:`1 - e^{-L_i / |y_i|}`, so that EUPMU
    steers to how likely the model finds text that it never saw. The score of a sequence is the log-odds of that
    probability.

    Args:
      apply: `apply(params, tokens) -> logits` of shape `(n, length, V)`; position t sees tokens up to t.
      hidden: `hidden(params, tokens) -> (n, length, d)`, the states of one layer, which RMU moves. XLA shares the
        computation that it has in common with `apply`.
      original: Parameters of the original model, a constant of which every compiled program holds a copy. For a large
        model, set JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1 in the environment, so that JAX passes it as an argument.
      retain: `"cross_entropy"`, `"kl"` or `"rmu"`.
      error: `"tokens"` or `"probability"`.
      constants: Constants of the forget losses, by loss and name, such as `{"npo": {"beta": 0.5}, "rmu": {"steering":
        20.0}}`; others keep the defaults of `objectives.language`.
      fresh_params: `fresh_params(key)`: untrained parameters.

    Returns:
      The task; the same arguments give equal tasks, except with `original`. `mask` has the shape of `tokens` and marks
      those that are predicted (not the prompt or padding), `alternative_mask` those of `alternative_tokens`; without a
      mask, all but the first are predicted. Pad on the right, unless `apply` can tell padding on the left from text.
      The outputs are the logits of all next tokens, `(n, length - 1, V)`; if the task or the batch has more, a dict
      with these as `logits`.

    Raises:
      ValueError: If `apply` or `hidden` is not a function, for an unknown retain loss, error or constant, a retain loss
        that needs `hidden` without it, an `original` with numbers that are not finite; and, when a step is traced, for
        a batch that lacks what its loss needs or has it in another shape. `unlearn` refuses sequences without any token
        to predict, tokens outside the vocabulary, an `original` whose structure or shapes differ from the parameters',
        and losses, logits or hidden states of the original model that are not finite.

    >>> task = language(lambda params, tokens: jax.nn.one_hot(tokens + 1, 5) * params)
    >>> batch = {"tokens": np.array([[0, 1, 2, 0]])}
    >>> float(task.error(task.outputs(9.0, batch, None), batch)[0])
    0.3333...
    """
    check_function("apply", apply, "a function (params, tokens) -> logits", 2)
    if hidden is not None:
        check_function("hidden", hidden, "a function (params, tokens) -> hidden states, or None", 2)
    if fresh_params is not None:
        check_function("fresh_params", fresh_params, "a function of a key, or None", 1)
    if retain not in tuple(RETAIN):
        raise ValueError(f"retain: got {retain!r}, expected one of {', '.join(RETAIN)}")
    if error not in tuple(ERROR):
        raise ValueError(f"error: got {error!r}, expected one of {', '.join(ERROR)}")
    if retain == "rmu" and hidden is None:
        raise ValueError("hidden: got None, but retain='rmu' needs it; expected (params, tokens) -> hidden states")
    check_constants("original", original)
    task = _task(apply, hidden, retain, error, fresh_params)
    if constants:
        task = task._replace(forget=with_constants(constants))
    if original is None:
        return task
    return task._replace(
        outputs=_with_original(task.outputs, original), check_model=_with_check(task.check_model, original)
    )


@functools.lru_cache(maxsize=64)
def _task(apply, hidden, retain, error, fresh_params):
    def outputs(params, batch, key):
        found = {"logits": _checked("apply", apply, params, batch["tokens"])[:, :-1]}
        if "alternative_tokens" in batch:
            found["alternative_logits"] = _checked("apply", apply, params, batch["alternative_tokens"])[:, :-1]
        if hidden is not None:
            found["hidden"] = _checked("hidden", hidden, params, batch["tokens"])[:, 1:]
        return found if len(found) > 1 else found["logits"]

    def draw(key, epoch, batch):
        # As shares of the vocabulary, whose size is known only from the logits.
        return batch | {"random_labels": jax.random.uniform(jax.random.fold_in(key, epoch), batch["tokens"].shape)}

    def divergence(ours, teacher, batch):
        return losses.kl_to_reference(logits_of(ours), logits_of(teacher), mask_of(batch))

    return Task(
        outputs=outputs,
        retain=RETAIN[retain],
        forget=FORGET,
        divergence=divergence,
        draw=draw,
        error=ERROR[error],
        rate=True,
        fresh_params=fresh_params,
        check=_check_answers,
        # A distance to the original model does not measure what a model knows.
        nll=None if retain == "cross_entropy" else RETAIN["cross_entropy"],
        check_model=functools.partial(_check_vocabulary, apply),
        score=_score,
    )


def _score(outputs, batch):
    return sequence_log_odds(nll_of(outputs, batch), mask_of(batch))


def _checked(name, function, params, tokens):
    returned = function(params, tokens)
    if getattr(returned, "ndim", None) != 3 or returned.shape[:2] != tokens.shape:
        shape = getattr(returned, "shape", type(returned).__name__)
        raise ValueError(f"{name}: returned {shape} for tokens {tokens.shape}, expected (n, length, any)")
    return returned


def _with_original(outputs, original):
    def both(params, batch, key):
        ours, reference = (as_dict(outputs(p, batch, key)) for p in (params, original))
        return ours | {f"reference_{name}": jax.lax.stop_gradient(leaf) for name, leaf in reference.items()}

    return both


def _with_check(check, original):
    def both(params, batch):
        check_same_shapes("original", original, "params", params)
        check(params, batch)

    return both


def _check_vocabulary(apply, params, batch):
    """Raises `ValueError` for tokens that the model does not have, which it would silently replace by others."""
    shape_of = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
    leaves, structure = jax.tree.flatten(jax.tree.map(shape_of, params))
    for name in ("tokens", "alternative_tokens"):
        if name in batch and np.size(batch[name]):
            tokens = np.asarray(batch[name])
            size = _vocabulary_of(apply, tuple(leaves), structure, tokens.shape[1])
            if tokens.max() >= size:
                raise ValueError(f"{name}: got token {tokens.max()}, expected tokens of the model, 0 to {size - 1}")


@functools.lru_cache(maxsize=64)
def _vocabulary_of(apply, leaves, structure, length):
    params, tokens = jax.tree.unflatten(structure, leaves), jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(lambda params, tokens: _checked("apply", apply, params, tokens), params, tokens).shape[-1]


def with_reference(
    task: Task, params: chex.ArrayTree, batch: Mapping[str, chex.Array], *, batch_size: int = 32, whole: bool = False
) -> dict[str, chex.Array]:
    """A set of sequences with the original model's values for each, computed once.

    All sets of a run have the same structure, so the retain set and held-out data need these values too.

    Args:
      task: Of `language`.
      params: Parameters of the original model.
      batch: A whole set: `tokens`, optionally `mask`, `alternative_tokens`, `alternative_mask`.
      batch_size: Sequences per forward pass.
      whole: Whether to add `reference_logits` `(n, length - 1, V)` and, if the task has `hidden`, `reference_hidden`
        `(n, length - 1, d)`: that many numbers for each token. Unless the vocabulary is small, give the task the
        `original` parameters instead.

    Returns:
      The set with `reference_nll` `(n,)`, and with `reference_alternative_nll` if there is an alternative.

    Raises:
      ValueError: For tokens that are not ints in the vocabulary, a mask of another shape, a sequence that has no token
        to predict, a loss of the original model that is not finite, or a batch size below 1.

    >>> task = language(lambda params, tokens: jax.numpy.zeros((*tokens.shape, 4)))
    >>> with_reference(task, None, {"tokens": np.array([[0, 1, 2]])})["reference_nll"].tolist()
    [2.7725...]
    """
    check_int("batch_size", batch_size, 1, static=True)
    _check_answers(batch)
    if task.check_model is not None:
        task.check_model(params, batch)
    if not len(batch["tokens"]):
        raise ValueError("batch: got no sequences, expected at least one")
    parts = [
        _reference_of(task, whole, params, {name: leaf[start : start + batch_size] for name, leaf in batch.items()})
        for start in range(0, len(batch["tokens"]), batch_size)
    ]
    found = dict(batch) | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _check_references(found)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reference_of(task, whole, params, batch):
    outputs = as_dict(task.outputs(params, batch, None))
    found = {"reference_nll": losses.sequence_nll(nll_of(outputs, batch), mask_of(batch))}
    if "alternative_logits" in outputs:
        nll = nll_of(outputs, batch, "alternative_")
        found["reference_alternative_nll"] = losses.sequence_nll(nll, mask_of(batch, "alternative_"))
    if whole:
        found |= {f"reference_{name}": outputs[name] for name in ("logits", "hidden") if name in outputs}
    return found


def _check_answers(batch):
    if not isinstance(batch, Mapping) or "tokens" not in batch:
        given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch: got {given}, expected a dict with tokens")
    # A mask under another library's name would go unread, and the prompt would be trained on.
    masks = [name for name in batch if "mask" in str(name) and name not in ("mask", "alternative_mask")]
    masks += ["labels"] * ("labels" in batch)
    others = [f"{type(leaf).__name__} as {name}" for name, leaf in batch.items() if isinstance(leaf, NOT_ARRAYS)]
    if masks or others:
        raise ValueError(
            f"batch: got {', '.join(masks or others)}, expected arrays, with mask for the tokens to predict and "
            "alternative_mask for those of the alternative"
        )
    for prefix in ("", "alternative_"):
        if f"{prefix}tokens" not in batch:
            continue
        tokens = np.asarray(batch[f"{prefix}tokens"])
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"{prefix}tokens: got shape {tokens.shape}, expected (examples, length)")
        if not np.issubdtype(tokens.dtype, np.integer) or (tokens.size and tokens.min() < 0):
            given = f"token {tokens.min()}" if np.issubdtype(tokens.dtype, np.integer) else f"{tokens.dtype}"
            raise ValueError(
                f"{prefix}tokens: got {given}, expected ints of at least 0; leave tokens out with {prefix}mask"
            )
        mask = np.asarray(batch.get(f"{prefix}mask", True))
        if not np.isin(mask, (0, 1)).all():
            given = mask[~np.isin(mask, (0, 1))][0]
            raise ValueError(f"{prefix}mask: got {given}, expected 1 for tokens to predict and 0 for all others")
        if len(empty := np.flatnonzero(~np.asarray(mask_of(batch, prefix)).any(axis=1))):
            raise ValueError(
                f"{prefix}mask: got no token to predict in sequence {empty[0]}, expected at least one after the "
                "first token of each"
            )
    _check_references(batch)


def _check_references(batch):
    for name in ("reference_nll", "reference_alternative_nll"):
        nll = np.asarray(batch.get(name, ()), np.float64)
        # That of a certain answer may be rounded to just below 0.
        if (wrong := ~(np.isfinite(nll) & (nll > -1e-3))).any():
            raise ValueError(
                f"{name}: got {nll[wrong][0]:.4g}, expected finite losses of the original model, at least 0"
            )
    for name in ("reference_logits", "reference_hidden"):
        # In a padded vocabulary, some logits are minus infinity.
        if name in batch and (np.isnan(batch[name]).any() or np.isposinf(batch[name]).any()):
            raise ValueError(f"{name}: got numbers that are not finite, expected those of the original model")
