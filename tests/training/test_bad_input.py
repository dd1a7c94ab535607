"""Input that `unlearn` refuses before any step, each with a message that names it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax import unlearn
from eupmu_jax.methods import loss_of
from eupmu_jax.tasks import Examples, classification

from .conftest import BOUNDED, FROZEN, SETTINGS, TASK, Store, apply


def without(tree, *names):
    return {name: leaf for name, leaf in tree.items() if name not in names}


def of_length(tree, **lengths):
    return {name: leaf[: lengths.get(name)] for name, leaf in tree.items()}


WEIGHTED = SETTINGS["weighted sum"]
BAD = {
    "an unknown method": ({"method": "magic"}, r"method: got 'magic', expected one of EUPMU, fine-tuning"),
    "no task": ({"task": apply}, r"task: got function, expected a Task"),
    "settings of another kind": ({"settings": [1]}, r"settings: got list, expected a dict"),
    "an unknown setting": (
        {"settings": WEIGHTED | {"tolerance": 1.0}},
        r"settings: got 'tolerance', which weighted sum does not read; expected any of learning_rate, ",
    ),
    "a setting that is not finite": (
        {"settings": WEIGHTED | {"learning_rate": np.nan}},
        r"settings\['learning_rate'\]: got nan, expected a finite number",
    ),
    "an infinite setting": (
        {"settings": WEIGHTED | {"retain_weight": np.inf}},
        r"settings\['retain_weight'\]: got inf, expected a finite number",
    ),
    "a setting that is no number": (
        {"settings": WEIGHTED | {"learning_rate": None}},
        r"settings\['learning_rate'\]: got None, expected a finite number",
    ),
    "a word for a number": (
        {"settings": WEIGHTED | {"learning_rate": "0.1"}},
        r"settings\['learning_rate'\]: got '0\.1', expected a finite number",
    ),
    "an unknown forget loss": (
        {"settings": WEIGHTED | {"forget_objective": "kindness"}},
        r"settings\['forget_objective'\]: got 'kindness', expected one of bounded_ascent, random_labels, ",
    ),
    "a list of forget losses": (
        {"settings": WEIGHTED | {"forget_objective": ["bounded_ascent"]}},
        r"settings\['forget_objective'\]: got \['bounded_ascent'\], expected one of bounded_ascent, random_labels, ",
    ),
    "an unknown curvature": (
        {"method": "influence", "settings": {"learning_rate": 1.0, "damping": 0.1, "curvature": "gauss"}},
        r"settings\['curvature'\]: got 'gauss', expected one of gauss_newton, empirical_fisher",
    ),
    "no damping": (
        {"method": "influence", "settings": {"learning_rate": 1.0, "damping": 0.0, "curvature": "gauss_newton"}},
        r"settings\['damping'\]: got 0\.0, expected a finite positive number",
    ),
    "an unknown optimizer": (
        {"settings": WEIGHTED | {"optimizer": "lion"}},
        r"settings\['optimizer'\]: got 'lion', expected one of adam, muon, sgd",
    ),
    "no forget loss": (
        {"settings": without(WEIGHTED, "forget_objective")},
        r"settings: got \{.*\}, expected 'forget_objective' too",
    ),
    "no weight": (
        {"settings": without(WEIGHTED, "retain_weight")},
        r"settings: got \{.*\}, expected 'retain_weight' too",
    ),
    "no fraction to prepare with": (
        {"method": "SalUn", "settings": BOUNDED},
        r"settings: got \{.*\}, expected 'mask_fraction' too",
    ),
    "an empty forget set": ({"forget": lambda d: of_length(d.forget, inputs=0, labels=0)}, r"forget: got an empty set"),
    "an empty retain set": ({"retain": lambda d: of_length(d.retain, inputs=0, labels=0)}, r"retain: got an empty set"),
    "an empty source": ({"forget": lambda d: Store({"labels": []})}, r"forget: got an empty set"),
    "nothing held out": ({"held_out": lambda d: Examples(d.tree, np.array([]))}, r"held_out: got an empty set"),
    "leaves of unequal length": (
        {"retain": lambda d: of_length(d.retain, labels=7)},
        r"retain: leaves have leading axes .*\(7,\).*, expected the same number of examples in all",
    ),
    "a leaf without examples": (
        {"forget": lambda d: d.forget | {"weight": np.float32(1)}},
        r"forget: leaves have leading axes .*\(\).*, expected the same number of examples in all",
    ),
    "unequal leaves behind ids": (
        {"forget": lambda d: Examples(of_length(d.tree, labels=7), np.arange(3))},
        r"forget: leaves have leading axes",
    ),
    "an id beyond the data": (
        {"forget": lambda d: Examples(d.tree, np.array([0, 1437]))},
        r"forget: got id 1437, expected ids from 0 to 1436",
    ),
    "a negative id": (
        {"retain": lambda d: Examples(d.tree, np.array([3, -1]))},
        r"retain: got id -1, expected ids from 0 to 1436",
    ),
    "a mask for ids": (
        {"forget": lambda d: Examples(d.tree, d.tree["labels"] == 3)},
        r"forget: got ids of shape \(1437,\) and type bool, expected \(n,\) ints",
    ),
    "a number": ({"forget": lambda d: 3}, r"forget: got int, expected a tree of arrays with one leading axis, or"),
    "lists": (
        {"forget": lambda d: {"inputs": [[0.0]], "labels": [3]}},
        r"forget: got dict, whose leaf \['inputs'\]\[0\]\[0\] is float, no array; expected a tree of arrays",
    ),
    # BUG: neither said that lists are the reason.
    "a list of examples": (
        {"forget": lambda d: [jax.tree.map(lambda leaf: leaf[0], d.forget)] * 3},
        r"forget: leaves have leading axes .*in all; stack a list of examples into one tree of arrays",
    ),
    "columns as lists": (
        {
            "forget": lambda d: type("Columns", (Store,), {"__getitem__": lambda self, at: {"labels": [3] * len(at)}})(
                d.forget
            )
        },
        r"forget: data\[positions\] gave leaves of type int, expected a tree of arrays, not of lists",
    ),
    "a source that drops examples": (
        {
            "retain": lambda d: type("Short", (Store,), {"__getitem__": lambda self, at: self.tree["inputs"][at[1:]]})(
                d.retain
            )
        },
        r"retain: data\[positions\] gave leaves of shapes \[\(1, 64\)\] for 2 positions",
    ),
    "another structure": (
        {"retain": lambda d: without(d.retain, "labels")},
        r"retain: got examples .*, expected them as in the forget set",
    ),
    "another shape": (
        {"retain": lambda d: d.retain | {"inputs": d.retain["inputs"][:, :63]}},
        r"retain: got examples .*, expected them as in the forget set",
    ),
    "another type": (
        {"retain": lambda d: d.retain | {"labels": d.retain["labels"] * 1.0}},
        r"retain: got examples .*, expected them as in the forget set",
    ),
    "another structure held out": (
        {"held_out": lambda d: without(d.held_out, "labels")},
        r"held_out: got examples .*, expected them as in the forget set",
    ),
    "no steps": ({"steps": 0}, r"steps: got 0, expected an int of at least 1"),
    "negative steps": ({"steps": -3}, r"steps: got -3, expected an int of at least 1"),
    "an empty forget batch": ({"forget_batch": 0}, r"forget_batch: got 0, expected an int of at least 1"),
    "an empty retain batch": ({"retain_batch": 0}, r"retain_batch: got 0, expected an int of at least 1"),
    "no checkpoint ever": ({"save_every": 0}, r"save_every: got 0, expected an int of at least 1"),
    "negative probes": ({"probes": -1}, r"probes: got -1, expected an int of at least 0"),
    "half a step": ({"steps": 2.5}, r"steps: got 2\.5, expected an int of at least 1"),
    "a negative seed": ({"seed": -1}, r"seed: got -1, expected an int of at least 0"),
    "steps that ascend": (
        {"settings": WEIGHTED | {"learning_rate": -0.1}},
        r"settings\['learning_rate'\]: got -0\.1, expected a finite number >= 0",
    ),
    "no parameters": ({"params": lambda d: {}}, r"params: got a tree without leaves"),
    "a counter among the parameters": (
        {"params": lambda d: d.params | {"count": jnp.int32(3)}},
        r"params: leaf \['count'\] is int32, expected floating point arrays alone",
    ),
    "a key among the parameters": (
        {"params": lambda d: d.params | {"key": jax.random.key(0)}},
        r"params: leaf \['key'\] is key<fry>, expected floating point arrays alone",
    ),
    "a mask of another structure": (
        {"frozen": {"hidden": True}},
        r"frozen: got no leaf \['bias'\], expected the structure of params",
    ),
    "a mask for all": ({"frozen": True}, r"frozen: got structure PyTreeDef\(\*\), expected that of params, "),
    "everything frozen": (
        {"frozen": dict.fromkeys(FROZEN, True)},
        r"frozen: every leaf is frozen, expected at least one trainable leaf",
    ),
    "a rate of nothing": (
        {"method": "EUPMU explicit", "settings": SETTINGS["EUPMU explicit"] | {"learning_rate": 0.0}},
        r"settings\['learning_rate'\]: got 0, expected a number above 0, by which",
    ),
    "a share above all": (
        {"method": "SalUn-soft", "settings": BOUNDED | {"sparsity": 50.0}},
        r"settings\['sparsity'\]: got 50\.0, expected a finite number >= 0 and <= 1",
    ),
    "momentum that never ends": (
        {"settings": WEIGHTED | {"momentum": 1.0}},
        r"settings\['momentum'\]: got 1\.0, expected a finite number >= 0 and < 1",
    ),
    "a loss below nothing": (
        {
            "method": "EUPMU",
            "settings": None,
            "task": TASK._replace(error=None, num_classes=None, retain=lambda outputs, batch: jnp.mean(outputs) - 99),
        },
        r"task\.error: got None, and a retain loss of -.*, but EUPMU steers an error that is never negative",
    ),
    "no weight of relabelling": (
        {"method": "random labels", "settings": {"learning_rate": 0.01}},
        r"settings: got \{.*\}, expected 'retain_weight' too",
    ),
    "two limits": (
        {"method": "EUPMU", "settings": {"allowed_error": 0.01, "limit": 0.1}},
        r"settings: got 'allowed_error' with 'limit' or 'allowed_rise', expected one kind of limit",
    ),
    "half a start": ({"start": {"retain_loss": 1.0}}, r"start: got .*, expected finite numbers retain_loss and retain"),
    "a start that is lost": (
        {"start": {"retain_loss": np.nan, "retain_error": 0.0}},
        r"start: got .*, expected finite numbers retain_loss and retain_error",
    ),
    # BUG: a traceback of NumPy.
    "a start without a figure": (
        {"start": {"retain_loss": 1.0, "retain_error": None}},
        r"start: got .*, expected finite numbers retain_loss and retain_error",
    ),
    "a start that is no dict": ({"start": 0.1}, r"start: got 0.1, expected finite numbers retain_loss and"),
    "a loss that is no scalar": (
        {"task": TASK._replace(retain=lambda outputs, batch: outputs)},
        r"task\.retain: returned shape \(2, 10\), expected a scalar",
    ),
    "a forget loss that is no scalar": (
        {"task": TASK._replace(forget={"bounded_ascent": lambda outputs, batch: outputs})},
        r"task\.forget\['bounded_ascent'\]: returned shape \(2, 10\), expected a scalar",
    ),
    # BUG: "leaf  has numbers", without a place.
    "a single array that is lost": (
        {"params": jnp.full((64, 10), jnp.nan)},
        r"params: leaf the tree itself has numbers that are not finite",
    ),
    # BUG: a TypeError of jax.grad, after the starting figures had been measured.
    "a loss that is a count": (
        {"task": TASK._replace(retain=lambda outputs, batch: jnp.sum(outputs > 0))},
        r"task\.retain: returned int32, expected a floating point number",
    ),
    "outputs of no example": (
        {"task": TASK._replace(num_classes=None, outputs=lambda params, batch, key: jnp.mean(params["bias"]))},
        r"task\.outputs: returned shape \(\) for 2 examples, expected them along the first axis",
    ),
    "a draw of fewer examples": (
        {"task": TASK._replace(draw=lambda key, epoch, batch: jax.tree.map(lambda leaf: leaf[1:], batch))},
        r"task\.draw: returned \{.*\} for 2 examples, expected them along the first axis",
    ),
    "one error for all": (
        {"task": TASK._replace(error=lambda outputs, batch: jnp.mean(outputs))},
        r"task\.error: returned shape \(\) for 2 examples, expected shape \(2,\)",
    ),
    "more classes than logits": (
        {"task": classification(apply, num_classes=12)},
        r"task\.outputs: returned shape \(2, 10\) for 2 examples, expected \(2, 12\): a logit for each class",
    ),
    # BUG: "'dict' object has no attribute 'shape'" alone.
    "more than logits": (
        {"task": classification(lambda params, inputs: {"logits": apply(params, inputs)}, 10)},
        r"apply: returned dict, expected logits of shape \(n, 10\) alone",
    ),
    "a column of labels": (
        {name: lambda d, name=name: column(getattr(d, name)) for name in ("forget", "retain")},
        r"forget: labels: got shape \(2, 1\)|forget: labels: got shape \(\d+, 1\), expected \(n,\) ints",
    ),
    "inputs beyond the range": (
        {
            "method": "boundary shrink",
            "settings": {"learning_rate": 0.01, "bound": 0.1},
            "forget": lambda d: d.forget | {"inputs": 2 * d.forget["inputs"]},
        },
        r"forget: got inputs from 0 to 2, expected numbers in \[0, 1\]",
    ),
    "a seed beyond what a key takes": ({"seed": 2**63}, r"seed: got 9223372036854775808, expected an int of at most"),
    "a leaf that cannot be saved": (
        {"params": lambda d: d.params | {"empty": jnp.zeros((0, 3))}},
        r"params: leaf \['empty'\] has shape \(0, 3\), which no checkpoint can hold",
    ),
    "lost parameters": (
        {"params": lambda d: d.params | {"bias": d.params["bias"].at[3].set(np.nan)}},
        r"params: leaf \['bias'\] has numbers that are not finite, expected those of a trained model",
    ),
    "frozen elements": (
        {"frozen": {"hidden": np.ones((64, 32), bool), "head": False, "bias": False}},
        r"frozen: leaf \['hidden'\] is an array of shape \(64, 32\), expected True or False, known before tracing$",
    ),
    "a number that is no real one": (
        {"settings": WEIGHTED | {"learning_rate": 1j}},
        r"settings\['learning_rate'\]: got 1j, expected a finite number",
    ),
    "a flag for a number": (
        {"settings": WEIGHTED | {"learning_rate": True}},
        r"settings.*: got True, expected a number",
    ),
    "other names": (
        {name: lambda d, name=name: {"image": getattr(d, name)["inputs"]} for name in ("forget", "retain")},
        r"forget: batch: got image, expected a dict with inputs and labels",
    ),
}


def column(tree):
    return tree | {"labels": tree["labels"][:, None]}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_before_any_step(digits, changes, message, tmp_path):
    def given(name, default):
        value = changes.get(name, default)
        of_digits = callable(value) and name in ("params", "forget", "retain", "held_out")
        return value(digits) if of_digits else value

    sets = [given(name, getattr(digits, name)) for name in ("params", "forget", "retain")]
    options = {"steps": 2, "settings": WEIGHTED, "probes": 0} | {
        name: given(name, None) for name in changes if name not in ("method", "task", "params", "forget", "retain")
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        unlearn(
            changes.get("method", "weighted sum"),
            changes.get("task", TASK),
            *sets,
            directory=tmp_path / "run",
            on_step=lambda: pytest.fail("made a step"),
            **options,
        )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 5}, r"^forget_batch: got 16, expected a multiple of 5"),
        ({"data": 16, "model": 1}, r"^retain_batch: got 40, expected a multiple of 16"),
        ({"model": 1}, r"^mesh: got axes model"),
    ],
)
def test_a_mesh_that_cannot_divide_a_batch_is_refused(digits, axes, message):
    mesh = types.SimpleNamespace(shape=axes)
    with pytest.raises(ValueError, match=message):
        digits.unlearn("weighted sum", mesh=mesh, retain_batch=40, on_step=lambda: pytest.fail("made a step"))


def test_the_error_for_an_unknown_forget_objective_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^forget_objective: got 'kindness', expected one of bounded_ascent, "):
        loss_of(TASK, "kindness")


def test_numpy_scalars_are_accepted_as_numbers(digits, tmp_path):
    counts = {"steps": np.int64(2), "seed": np.int64(1), "forget_batch": np.int32(8), "save_every": np.int64(1)}
    digits.unlearn("weighted sum", directory=tmp_path, **counts)
