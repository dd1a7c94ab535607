"""Batches, options and models that the language task refuses."""

import types

import jax
import numpy as np
import pytest

from eupmu_jax import tasks
from eupmu_jax.tasks import with_reference
from eupmu_jax.training.unlearning import unlearn

from .test_language import BATCH, CACHED, LENGTH, ORIGINAL, PARAMS, TASK, VOCABULARY, N, apply, value_of

TOKENS = {"tokens": BATCH["tokens"]}
PAIRS = TOKENS | {"alternative_tokens": BATCH["alternative_tokens"]}
MISSING = {
    "npo": (TOKENS, r"batch: got tokens, but npo needs reference_nll; expected a batch from tasks\.with_reference"),
    "undial": (TOKENS, r"batch: got tokens, but undial needs reference_logits"),
    "dpo": (TOKENS, r"batch: got tokens, but dpo needs alternative_tokens; expected the prompt with another answer"),
    "lrml": (
        PAIRS | {"reference_nll": CACHED["reference_nll"]},
        r"batch: got .*, but lrml needs reference_alternative_nll",
    ),
    "rmu": (TOKENS, r"hidden: got None, but rmu needs it"),
}


@pytest.mark.parametrize(("name", "batch", "message"), [(name, *row) for name, row in MISSING.items()], ids=MISSING)
def test_inputs_that_a_loss_lacks_are_named_when_it_is_traced(name, batch, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        value_of(tasks.language(apply), name, PARAMS, batch)


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("npo", {"reference_nll": np.zeros((N, LENGTH))}, r"reference_nll: got shape \(5, 6\), expected one number"),
        (
            "dpo",
            {"reference_alternative_nll": np.zeros(N + 1)},
            r"reference_nll: got shape \(6,\), expected one number",
        ),
        ("undial", {"reference_logits": np.zeros((N, LENGTH, VOCABULARY))}, r"reference_logits: got shape \(5, 6, 7\)"),
        ("wga", {"mask": np.ones((N, LENGTH - 1))}, r"mask: got shape \(5, 5\), expected that of tokens, \(5, 6\)"),
        (
            "dpo",
            {"alternative_mask": np.ones((N, LENGTH))},
            r"alternative_mask: got shape \(5, 6\), expected that of alt",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_when_traced(name, leaf, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        value_of(TASK, name, PARAMS, CACHED | leaf)


@pytest.mark.parametrize("name", ["reference_nll", "reference_alternative_nll"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_losses_that_no_original_model_has_are_refused(name, wrong):
    TASK.check(CACHED | {name: np.where(np.arange(N) == 2, -1e-6, CACHED[name])})
    message = f"^{name}: got {wrong:.4g}, expected finite losses of the original model, at least 0"
    with pytest.raises(ValueError, match=message):
        TASK.check(CACHED | {name: np.where(np.arange(N) == 2, wrong, CACHED[name])})


EMPTY = np.where(np.arange(N)[:, None] == 3, np.arange(LENGTH) == 0, True)
BAD = {
    "an empty answer": (
        lambda: with_reference(TASK, ORIGINAL, BATCH | {"mask": EMPTY}),
        r"mask: got no token to predict in sequence 3, expected at least one after the first token",
    ),
    "an empty alternative": (
        lambda: with_reference(TASK, ORIGINAL, BATCH | {"alternative_mask": np.zeros((N, 4))}),
        r"alternative_mask: got no token to predict in sequence 0",
    ),
    "no tokens": (
        lambda: with_reference(TASK, ORIGINAL, {"inputs": 1}),
        r"batch: got inputs, expected a dict with tokens",
    ),
    "no slices": (
        lambda: with_reference(TASK, ORIGINAL, BATCH, batch_size=0),
        r"batch_size: got 0, expected an int of at least 1",
    ),
    "no hidden states": (lambda: tasks.language(apply, hidden=3), r"hidden: got 3, expected a function"),
    "a retain loss": (
        lambda: tasks.language(apply, retain="l2"),
        r"retain: got 'l2', expected one of cross_entropy, kl",
    ),
    "retain losses": (lambda: tasks.language(apply, retain=["kl"]), r"retain: got \['kl'\], expected one of cross_e"),
    "nothing to hold still": (lambda: tasks.language(apply, retain="rmu"), r"hidden: got None, but retain='rmu' needs"),
    "no such loss": (
        lambda: tasks.language(apply, constants={"nop": {"beta": 1.0}}),
        r"constants: got 'nop', expected one of bounded_ascent, ",
    ),
    "no such constant": (
        lambda: tasks.language(apply, constants={"lrml": {"beta": 1.0, "gamma": 1.0}}),
        r"constants\['lrml'\]: got gamma, expected beta or tau",
    ),
    "a constant that is no number": (
        lambda: tasks.language(apply, constants={"npo": {"beta": "0.5"}}),
        r"constants\['npo'\]\['beta'\]: got '0\.5', expected a number above 0",
    ),
    "an exponent below 0": (
        lambda: tasks.language(apply, constants={"wga": {"beta": -1}}),
        r"constants\['wga'\]\['beta'\]: got -1, expected a number of at least 0",
    ),
    "a constant to divide by": (
        lambda: tasks.language(apply, constants={"lrml": {"tau": 0}}),
        r"constants\['lrml'\]\['tau'\]: got 0, expected a number above 0",
    ),
    "a constant without a name": (
        lambda: tasks.language(apply, constants={"npo": 0.5}),
        r"constants\['npo'\]: got 0\.5, expected a dict of numbers by name",
    ),
    "constants without names": (
        lambda: tasks.language(apply, constants=["npo"]),
        r"constants: got \['npo'\], expected a dict of dicts by loss and name",
    ),
    "a model in place of its function": (
        lambda: tasks.language(types.SimpleNamespace(apply=apply, params=ORIGINAL)),
        r"apply: got SimpleNamespace, whose function is \.apply, expected a function",
    ),
    "no sequences": (
        lambda: with_reference(TASK, ORIGINAL, {name: leaf[:0] for name, leaf in BATCH.items()}),
        r"batch: got no sequences, expected at least one",
    ),
    "tokens of another model": (
        lambda: with_reference(TASK, ORIGINAL, BATCH | {"tokens": np.full_like(BATCH["tokens"], VOCABULARY)}),
        r"tokens: got token 7, expected tokens of the model, 0 to 6",
    ),
    "no constants": (
        lambda: tasks.language(apply, constants={"gradient_ascent": {"beta": 1.0}}),
        r"constants\['gradient_ascent'\]: got beta, expected none",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_before_any_work(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("tokens", [np.array([[0, 1, -100]]), np.array([[0.0, 1.0]])])
def test_invalid_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match=r"^tokens: got .*, expected ints of at least 0"):
        tasks.with_reference(tasks.language(apply), ORIGINAL, {"tokens": tokens})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"input_ids": b["tokens"]}, "batch: got input_ids, expected a dict with tokens"),
        (lambda b: b["tokens"], "batch: got ndarray, expected a dict with tokens"),
        (lambda b: {"tokens": b["tokens"], "attention_mask": b["mask"]}, "batch: got attention_mask, expected arrays"),
        (lambda b: {"tokens": b["tokens"], "mask": None}, "batch: got NoneType as mask, expected arrays"),
        # BUG: an AttributeError that named no argument.
        (lambda b: {"tokens": b["tokens"].tolist()}, "batch: got list as tokens, expected arrays"),
        (lambda b: {"tokens": b["tokens"], "labels": b["tokens"]}, "batch: got labels, expected arrays, with mask"),
        # BUG: JAX's words about a negative shape.
        (lambda b: {"tokens": b["tokens"][:, :0]}, r"tokens: got shape \(5, 0\), expected \(examples, length\)"),
    ],
)
def test_a_batch_with_other_names_or_types_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tasks.with_reference(tasks.language(apply), ORIGINAL, change(BATCH))


@pytest.mark.parametrize(
    "wrong", [lambda logits: (logits, 0), lambda logits: logits[:, 1:], lambda logits: logits[:, 0]]
)
def test_logits_of_another_shape_are_refused(wrong):
    task = tasks.language(lambda params, tokens: wrong(apply(params, tokens)))
    with pytest.raises(ValueError, match=r"apply: returned .* for tokens \(5, 6\), expected \(n, length, any\)"):
        task.outputs(ORIGINAL, BATCH, None)


def test_tokens_that_the_model_does_not_have_are_refused(caplog):
    lost = {name: leaf for name, leaf in BATCH.items() if name in ("tokens", "mask")}
    lost = lost | {"tokens": np.full_like(lost["tokens"], VOCABULARY)}
    kept = {name: BATCH[name] for name in lost}
    settings = {"learning_rate": 1e-3, "forget_objective": "gradient_ascent", "retain_weight": 1.0}
    for sets, named in (((lost, kept), "forget"), ((kept, lost), "retain")):
        with pytest.raises(ValueError, match=f"^{named}: tokens: got token 7, expected tokens of the model, 0 to 6"):
            unlearn("weighted sum", tasks.language(apply), ORIGINAL, *sets, steps=1, settings=settings)
    unlearn("weighted sum", tasks.language(apply), ORIGINAL, kept, kept, steps=1, settings=settings)
    assert "not finite" not in caplog.text


@pytest.mark.parametrize("prefix", ["", "alternative_"])
@pytest.mark.parametrize("value", [0.5, -100, 2])
def test_a_mask_of_weights_is_refused(prefix, value):
    # BUG: any value other than 0 counted as 1, even -100.
    mask = np.array(BATCH[f"{prefix}mask"], float)
    mask[0, -1] = value
    with pytest.raises(ValueError, match=f"^{prefix}mask: got {float(value)}, expected 1 for tokens to predict and 0"):
        tasks.with_reference(TASK, ORIGINAL, BATCH | {f"{prefix}mask": mask})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda original: {}, "^forget: original: got no leaf"),
        (lambda original: jax.tree.map(lambda leaf: leaf[..., :1], original), "^forget: original: leaf .* has shape"),
        (lambda original: jax.tree.map(lambda leaf: leaf * np.nan, original), "^original: leaf .* not finite"),
    ],
)
def test_an_original_of_another_model_is_refused_before_any_step(change, message):
    # BUG: it raised a raw KeyError, or the parameters were ruined.
    batch = {name: BATCH[name] for name in ("tokens", "mask")}
    begin = lambda original: unlearn(
        "weighted sum", tasks.language(apply, original=original), ORIGINAL, batch, batch, steps=1
    )
    with pytest.raises(ValueError, match=message):
        begin(change(ORIGINAL))


def test_reference_logits_that_are_not_finite_are_refused():
    batch = tasks.with_reference(TASK, ORIGINAL, BATCH, whole=True)
    lost = batch | {"reference_logits": np.asarray(batch["reference_logits"]) * np.nan}
    with pytest.raises(ValueError, match=r"^forget: reference_logits: got numbers that are not finite"):
        unlearn("weighted sum", tasks.language(apply), ORIGINAL, lost, lost, steps=1)
