"""Losses of the tasks against explicit formulas, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from scipy.special import log_softmax

from eupmu_jax import objectives, tasks
from eupmu_jax.tasks import _constants

VOCABULARY, LENGTH = 7, 6


def table_of_logits(params, tokens):
    return params[tokens]


@pytest.fixture(scope="module")
def language():
    """The task of a bigram model, its parameters, a batch with a mask, and -log p of every next token."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(2 * rng.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    tokens = rng.integers(VOCABULARY, size=(4, LENGTH))
    mask = rng.integers(2, size=tokens.shape)
    mask[:, 1] = 1
    task = tasks.language(table_of_logits)
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    logs = log_softmax(np.asarray(params, np.float64)[tokens[:, :-1]], axis=-1)
    losses = -np.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
    return task, params, batch, losses, logs


def weighted(values, batch):
    mask = np.asarray(batch["mask"])[:, 1:]
    return np.sum(values * mask) / mask.sum()


def test_losses_of_a_language_model_follow_their_formulas(language):
    task, params, batch, losses, logs = language
    outputs = task.outputs(params, batch, None)
    expected = {
        "bounded_ascent": weighted(np.maximum(np.log(VOCABULARY) - losses, 0), batch),
        "kl_to_uniform": weighted(-logs.mean(-1) - np.log(VOCABULARY), batch),
        "gradient_ascent": -weighted(losses, batch),
    }
    np.testing.assert_allclose(task.retain(outputs, batch), weighted(losses, batch), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(task.forget[name](outputs, batch), value, rtol=1e-5, err_msg=name)
    unmasked = {"tokens": batch["tokens"]}
    np.testing.assert_allclose(task.retain(outputs, unmasked), losses.mean(), rtol=1e-5)


def test_masked_tokens_do_not_change_the_losses(language):
    task, params, batch, _, _ = language
    outputs = task.outputs(params, batch, None)
    other = jnp.where(batch["mask"][:, 1:, None] == 1, outputs, outputs + 5 * jnp.arange(VOCABULARY))
    drawn = task.draw(jax.random.key(0), 0, batch)
    # test_language.py covers losses that need more of a batch.
    plain = [task.forget[name] for name in ("bounded_ascent", "random_labels", "kl_to_uniform", "gradient_ascent")]
    for loss in (task.retain, *plain, task.error):
        np.testing.assert_array_equal(loss(outputs, drawn), loss(other, drawn))


def test_random_labels_that_were_not_drawn_are_named(language):
    task, params, batch, *_ = language
    classifier, examples = tasks.classification(lambda w, x: x @ w, 2), {"inputs": np.eye(2), "labels": np.arange(2)}
    for made, weights, given in ((task, params, batch), (classifier, np.eye(2), examples)):
        message = f"^batch: got {', '.join(given)}, but random_labels needs labels that are drawn; expected task.draw"
        with pytest.raises(ValueError, match=message):
            made.forget["random_labels"](made.outputs(weights, given, None), given)


@pytest.mark.slow
def test_random_labels_of_a_language_model_are_drawn_from_all_wrong_tokens():
    task = tasks.language(table_of_logits)
    tokens = jnp.broadcast_to(jnp.arange(VOCABULARY), (300, VOCABULARY))
    seen = set()
    for epoch in range(3):
        batch = task.draw(jax.random.key(0), epoch, {"tokens": tokens})
        # With one-hot logits, the loss reveals which label was drawn.
        losses = jax.vmap(
            lambda k, batch=batch: task.forget["random_labels"](
                jnp.full((*tokens[:, 1:].shape, VOCABULARY), -40.0).at[..., k].set(0.0), batch
            )
        )(jnp.arange(VOCABULARY))
        seen.add(tuple(np.asarray(losses).round(3)))
    assert len(seen) == 3, "redrawn in every pass"
    one = jnp.array([[0, 3]])
    loss = jax.jit(task.forget["random_labels"])
    for share in np.linspace(0, 1 - 1e-6, 50):
        batch = {"tokens": one, "random_labels": jnp.full((1, 2), share, jnp.float32)}
        hot = lambda k: jnp.full((1, 1, VOCABULARY), -40.0).at[..., k].set(0.0)
        losses = [float(loss(hot(k), batch)) for k in range(VOCABULARY)]
        assert np.argmin(losses) == (3 + 1 + int(np.float32(share) * (VOCABULARY - 1))) % VOCABULARY != 3


def test_error_is_the_share_of_tokens_not_predicted(language):
    task, params, batch, _, _ = language
    wrong = np.argmax(np.asarray(params)[batch["tokens"][:, :-1]], -1) != np.asarray(batch["tokens"][:, 1:])
    mask = np.asarray(batch["mask"])[:, 1:]
    expected = (wrong * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(task.error(task.outputs(params, batch, None), batch), expected, rtol=1e-6)


def test_error_may_be_one_minus_the_probability_of_an_answer(language):
    _, params, batch, losses, _ = language
    task = tasks.language(table_of_logits, error="probability")
    mask = np.asarray(batch["mask"])[:, 1:]
    expected = 1 - np.exp(-(losses * mask).sum(1) / mask.sum(1))
    np.testing.assert_allclose(task.error(task.outputs(params, batch, None), batch), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^error: got 'nll', expected one of tokens, probability$"):
        tasks.language(table_of_logits, error="nll")


def test_a_classifier_gets_augmented_inputs_only_in_steps():
    augment = lambda key, inputs: inputs + jax.random.normal(key, inputs.shape)
    task = tasks.classification(lambda params, inputs: inputs @ params, 3, augment=augment)
    batch = {"inputs": jnp.ones((2, 3)), "labels": jnp.array([0, 2])}
    plain, shown = (task.outputs(jnp.eye(3), batch, key) for key in (None, jax.random.key(0)))
    np.testing.assert_array_equal(plain, batch["inputs"])
    np.testing.assert_array_equal(shown, augment(jax.random.key(0), batch["inputs"]))


def test_a_classifier_draws_the_labels_that_the_objectives_document():
    task = tasks.classification(lambda params, inputs: inputs, 10)
    batch = {"inputs": jnp.zeros((50, 10)), "labels": jnp.arange(50) % 10}
    drawn = task.draw(jax.random.key(3), 2, batch)["random_labels"]
    expected = objectives.random_labels(jax.random.fold_in(jax.random.key(3), 2), batch["labels"], 10)
    np.testing.assert_array_equal(drawn, expected)
    assert not np.any(drawn == batch["labels"])


def test_equal_arguments_give_the_same_task():
    apply = lambda params, inputs: inputs
    assert tasks.classification(apply, 3) is tasks.classification(apply, 3)
    assert hash(tasks.classification(apply, 3)) != hash(tasks.classification(apply, 4))


LOSS = lambda outputs, batch: jnp.mean(outputs)
OUTPUTS = lambda params, batch, key: params


@dataclasses.dataclass
class Callable:
    """A callable model in a common style: its fields can change, so it is not hashable."""

    scale: float = 1.0

    def __call__(self, params, inputs):
        return self.scale * inputs @ params


BAD = {
    "no function": (lambda: tasks.classification(3, 10), r"apply: got 3, expected a function"),
    "one class": (lambda: tasks.classification(LOSS, 1), r"num_classes: got 1, expected an int of at least 2"),
    "half a class": (lambda: tasks.classification(LOSS, 2.5), r"num_classes: got 2\.5, expected an int of at least 2"),
    # BUG: "got 3", and in a task of one's own "unhashable type" alone.
    "classes counted by JAX": (
        lambda: tasks.classification(LOSS, jnp.int32(3)),
        r"num_classes: got Array\(3, .*\), expected an int of at least 2",
    ),
    "classes of a task counted by JAX": (
        lambda: tasks.Task(OUTPUTS, LOSS, {"a": LOSS}, num_classes=jnp.int32(3)),
        r"task\.num_classes: got Array\(3, .*\), expected an int of at least 2",
    ),
    "a dict": (lambda: tasks.classification({}, 3), r"apply: got \{\}, expected a function"),
    "no hash": (
        lambda: tasks.classification(Callable(), 3),
        r"apply: got Callable, which is not hashable, expected a func",
    ),
    "no hash of a language model": (lambda: tasks.language(Callable()), r"apply: got Callable, which is not hashable"),
    # BUG: modules are callable, and arguments were counted inside a trace alone; both ended in a TypeError.
    "a module": (
        lambda: tasks.classification(nn.Dense(3), 3),
        r"apply: got Dense, whose function is \.apply, expected a f",
    ),
    "an NNX module": (
        lambda: tasks.classification(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 3),
        r"apply: got the module Linear, which nnx\.split and nnx\.merge turn into a function, expected a function",
    ),
    "no parameters": (
        lambda: tasks.classification(lambda inputs: inputs, 3),
        r"apply: got a function of \(inputs\), expected a function \(params, inputs\) -> logits",
    ),
    "no key": (
        lambda: tasks.Task(LOSS, LOSS, {"a": LOSS}),
        r"task\.outputs: got a function of \(.*\), expected a function \(params, batch, key\) -> outputs",
    ),
    "no model": (lambda: tasks.language(None), r"apply: got None, expected a function"),
    "no outputs": (lambda: tasks.Task(None, LOSS, {"a": LOSS}), r"task\.outputs: got None, expected a function"),
    "no retain loss": (lambda: tasks.Task(OUTPUTS, 1.0, {"a": LOSS}), r"task\.retain: got 1\.0, expected a function"),
    "no forget losses": (
        lambda: tasks.Task(OUTPUTS, LOSS, {}),
        r"task\.forget: got \{\}, expected a dict of at least one",
    ),
    "a forget loss": (lambda: tasks.Task(OUTPUTS, LOSS, LOSS), r"task\.forget: got <function .*, expected a dict"),
    "no loss": (lambda: tasks.Task(OUTPUTS, LOSS, {"a": 2}), r"task\.forget\['a'\]: got 2, expected a function"),
    "an error": (
        lambda: tasks.Task(OUTPUTS, LOSS, {"a": LOSS}, error=0.5),
        r"task\.error: got 0\.5, expected a function",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_invalid_tasks_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tasks.check_task(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: tasks.language(table_of_logits, **more),
        lambda **more: tasks.diffusion(
            lambda params, x_t, t, labels: x_t, objectives.diffusion.cosine_schedule(10), num_conditions=2, **more
        ),
    ],
)
def test_a_large_original_gets_a_warning_that_says_how_to_avoid_copies(make, caplog, monkeypatch):
    original = {"weight": jnp.ones(8), "bias": jnp.ones(2)}
    monkeypatch.setattr(_constants, "LARGE", 40)
    make(original=original)
    assert not caplog.text
    monkeypatch.setattr(_constants, "LARGE", 39)
    make()
    assert not caplog.text
    make(original=original)
    assert "original: got 4e-08 GB" in caplog.text
    assert "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS=1" in caplog.text


def test_a_random_label_of_a_masked_class_adds_nothing():
    # BUG: the loss was infinite, and every step refused.
    task = tasks.classification(lambda params, inputs: inputs, num_classes=3)
    logits = jnp.array([[0.0, 0.0, -jnp.inf], [0.0, 0.0, -jnp.inf]])
    batch = {"inputs": logits, "labels": jnp.zeros(2, int), "random_labels": jnp.array([2, 1])}
    value, slope = jax.value_and_grad(lambda x: task.forget["random_labels"](x, batch))(logits)
    assert float(value) == pytest.approx(np.log(2) / 2)
    assert jnp.all(jnp.isfinite(slope))


class OneAtATime:
    """A dataset whose check of the bounds takes a single position."""

    def __len__(self):
        return 3

    def __getitem__(self, position):
        if position >= len(self):
            raise IndexError(position)
        return {"inputs": np.zeros((len(position), 2))}


def test_a_dataset_that_takes_single_positions_alone_is_named_with_its_own_error():
    # BUG: "The truth value of an array ... is ambiguous" alone.
    with pytest.raises(ValueError, match=r"^forget: got OneAtATime, which gives no batch .* \(ValueError: The truth"):
        tasks.as_examples("forget", OneAtATime())
