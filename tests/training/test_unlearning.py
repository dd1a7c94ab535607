"""`unlearn` on digits of the user's own: what it gives, what it takes, what stops it, and what it refuses."""

import functools
import os
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax import data, unlearn
from eupmu_jax.methods import loss_of
from eupmu_jax.sharding import make_mesh
from eupmu_jax.tasks import Examples, as_examples, classification
from eupmu_jax.training import fitting

PASSES = {
    "fine-tuning": ((0, 1), (0, 1)),
    "gradient ascent": ((1, 0), (1, 0)),
    "random labels": ((1, 1), (1, 1)),
    "EUPMU explicit": ((1, 1), (1, 1)),
    "EUPMU implicit": ((1, 2), (1, 1)),
    "EUPMU next-batch": ((1, 1), (1, 1)),
}
BOUNDED = {"learning_rate": 0.003, "forget_objective": "bounded_ascent"}
SETTINGS = {
    "weighted sum": BOUNDED | {"retain_weight": 1.0},
    "EUPMU explicit": BOUNDED | {"allowed_rise": 0.05},
    "EUPMU": BOUNDED | {"allowed_rise": 0.05},
}


def apply(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["head"] + params["bias"]


TASK = classification(apply, num_classes=10)


class Digits:
    """Trained parameters; all digits, those of class 3 and the others, and some that were never seen."""

    def __init__(self):
        loaded = data.load("digits", seed=0)
        flat = lambda images, labels: {"inputs": images.reshape(-1, 64), "labels": labels}
        tree = flat(loaded.train_images, loaded.train_labels)
        is_forgotten = loaded.train_labels == 3
        self.forget, self.retain = (jax.tree.map(lambda leaf: leaf[at], tree) for at in (is_forgotten, ~is_forgotten))  # noqa: B023
        self.held_out = flat(loaded.test_images, loaded.test_labels)
        self.tree, self.ids = tree, (np.flatnonzero(is_forgotten), np.flatnonzero(~is_forgotten))
        keys = jax.random.split(jax.random.key(0))
        start = {
            "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
            "head": jax.random.normal(keys[1], (32, 10)) / 6,
            "bias": jnp.zeros(10),
        }
        loss = lambda params, statistics, batch, key: (
            TASK.retain(TASK.outputs(params, batch, None), batch),
            statistics,
        )
        recipe = {"epochs": 15, "batch_size": 64, "learning_rate": 0.01, "seed": 0}
        self.params = fitting.fit(loss, start, {}, as_examples("train", tree), **recipe).params

    def unlearn(self, method, *, settings=None, **options):
        settings = SETTINGS.get(method) if settings is None else settings
        options = {"steps": 12, "forget_batch": 16, "retain_batch": 48, "probes": 0} | options
        return unlearn(method, TASK, self.params, self.forget, self.retain, settings=settings, **options)


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.slow
@pytest.mark.parametrize("method", PASSES)
def test_a_run_counts_its_passes_and_is_watched(digits, method):
    before = jax.tree.map(np.asarray, digits.params)
    ticks = []
    run = digits.unlearn(method, steps=18, retain_batch=144, probes=4, on_step=lambda: ticks.append(1))
    assert len(ticks) == 18
    chex.assert_trees_all_equal_shapes_and_dtypes(run.params, digits.params)
    chex.assert_trees_all_equal(digits.params, before)
    chex.assert_tree_all_finite(run.params)
    (forget_forward, retain_forward), (forget_backward, retain_backward) = PASSES[method]
    assert run.forward == 18 * (16 * forget_forward + 144 * retain_forward)
    assert run.backward == 18 * (16 * forget_backward + 144 * retain_backward)
    assert {len(values) for values in run.history.values()} == {5}
    assert run.history["step"] == [0, 4, 9, 14, 18]
    assert all(np.isnan(value) != method.startswith("EUPMU") for value in run.history["multiplier"])
    assert all(-1.001 <= value <= 1.001 for value in run.history["cosine"])
    assert run.history["retain_loss"][0] == run.figures["original"]["retain_loss"]
    assert run.history["forget_loss"][-1] == run.figures["last"]["forget_loss"]
    assert run.figures["returned"] == run.figures["last"]
    assert run.share is None


@pytest.mark.slow
def test_without_probes_nothing_is_measured(digits):
    run = digits.unlearn("weighted sum", held_out=digits.held_out)
    assert run.history == run.figures == {}


@pytest.mark.slow
def test_a_run_is_reproduced_by_its_seed(digits):
    first, again, other = (digits.unlearn("random labels", seed=s, probes=2) for s in (0, 0, 1))
    chex.assert_trees_all_equal(first.params, again.params)
    assert first.history["forget_loss"] == again.history["forget_loss"]
    assert first.history["forget_loss"] != other.history["forget_loss"]


def test_forget_losses_move_the_way_they_should(digits):
    ascent = digits.unlearn("gradient ascent", settings={"learning_rate": 0.01}, probes=1).history
    tuned = digits.unlearn("fine-tuning", settings={"learning_rate": 0.001}, probes=1).history
    assert ascent["forget_loss"][-1] > 2 * ascent["forget_loss"][0]
    assert tuned["retain_loss"][-1] < tuned["retain_loss"][0]


def test_who_knows_nothing_gets_a_result_that_keeps_the_limit(digits):
    run = digits.unlearn("EUPMU", steps=60, probes=1, held_out=digits.held_out)
    original, returned = run.figures["original"], run.figures["returned"]
    assert returned["retain_error"] <= original["retain_error"] + 0.01
    assert original["forget_error"] < 0.1
    assert returned["forget_error"] > 0.9
    assert 0.5 < run.share <= 1
    names = {f"{part}_{figure}" for part in ("forget", "retain", "held_out") for figure in ("loss", "error")}
    assert {name: set(row) for name, row in run.figures.items()} == dict.fromkeys(
        ("original", "last", "returned"), names
    )
    logits = apply(digits.params, digits.held_out["inputs"])
    wrong = np.mean(np.argmax(np.asarray(logits), -1) != digits.held_out["labels"])
    assert original["held_out_error"] == pytest.approx(wrong, abs=1e-6)


def test_a_limit_that_takes_most_back_is_warned_of(digits):
    settings = SETTINGS["EUPMU"] | {"learning_rate": 0.3, "allowed_rise": 1e-4}
    with pytest.warns(UserWarning, match=r"^the limit left 0\.\d\d of the way to the parameters after the last step"):
        run = digits.unlearn("EUPMU", settings=settings, probes=1)
    assert run.share < 0.5
    assert run.figures["returned"]["retain_loss"] < run.figures["last"]["retain_loss"]


def test_progress_shows_the_figures(digits, capsys):
    run = digits.unlearn("EUPMU", steps=3, probes=1, progress=True)
    printed = capsys.readouterr().out
    assert "returned" in printed
    assert f"{run.figures['returned']['retain_loss']:.4f}" in printed
    assert f"{100 * run.share:.0f} % of the way" in printed


def test_compiling_beforehand_changes_nothing(digits):
    warm, cold = (digits.unlearn("EUPMU", warm=warm, probes=2) for warm in (True, False))
    chex.assert_trees_all_equal(warm.params, cold.params)
    assert warm.history == cold.history
    assert warm.compile_seconds > 0 == cold.compile_seconds


# What the sets may be kept in.


class Store:
    """Examples that are somewhere else, asked for by arrays of positions."""

    def __init__(self, tree):
        self.tree, self.asked = tree, []

    def __len__(self):
        return len(self.tree["labels"])

    def __getitem__(self, positions):
        self.asked.append(len(positions))
        return {name: leaf[positions] for name, leaf in self.tree.items()}


@pytest.mark.parametrize("method", ["weighted sum", "EUPMU"])
def test_a_source_gives_what_arrays_give(digits, method):
    whole = digits.unlearn(method, probes=2)
    forget, retain = Store(digits.forget), Store(digits.retain)
    options = {"steps": 12, "forget_batch": 16, "retain_batch": 48, "probes": 2, "settings": SETTINGS[method]}
    run = unlearn(method, TASK, digits.params, forget, retain, **options)
    chex.assert_trees_all_close(run.params, whole.params, rtol=1e-5, atol=1e-6)
    for name in ("forget_loss", "retain_loss", "cosine"):
        np.testing.assert_allclose(run.history[name], whole.history[name], rtol=1e-4, atol=1e-5)
    assert forget.asked.count(16) >= 12
    assert max(retain.asked) <= 64 or method == "EUPMU"


def test_two_sets_of_one_tree_give_what_two_trees_give(digits):
    sets = (Examples(digits.tree, ids) for ids in digits.ids)
    run = unlearn("random labels", TASK, digits.params, *sets, steps=12, forget_batch=16, retain_batch=48, probes=0)
    chex.assert_tree_all_finite(run.params)
    sets = (Examples(digits.tree, ids) for ids in digits.ids)
    options = {"steps": 12, "forget_batch": 16, "retain_batch": 48, "probes": 0, "settings": SETTINGS["weighted sum"]}
    run = unlearn("weighted sum", TASK, digits.params, *sets, **options)
    chex.assert_trees_all_equal(run.params, digits.unlearn("weighted sum").params)


# Parameters of other kinds.


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [{"hidden": True, "head": False, "bias": False}, lambda params: FROZEN])
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(digits, is_frozen):
    run = digits.unlearn("EUPMU", frozen=is_frozen)
    np.testing.assert_array_equal(run.params["hidden"], digits.params["hidden"])
    for name in ("head", "bias"):
        assert np.all(run.params[name] != digits.params[name]), name
    assert apply(run.params, digits.forget["inputs"]).shape == (len(digits.forget["labels"]), 10)


FROZEN = {"hidden": True, "head": False, "bias": False}


class Model(nnx.Module):
    """With running statistics and dropout beside its parameters."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, inputs):
        return self.head(self.dropout(jnp.tanh(self.norm(self.hidden(inputs)))))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_state_of_a_flax_model_goes_in_and_comes_out(digits, frozen, tmp_path):
    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    task = classification(lambda params, inputs: nnx.merge(graph, params, rest)(inputs), num_classes=10)
    only_head = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "head" not in str(path[0]), params)
    # Nothing is learned here yet, so there is nothing to forget: a target and a limit that the last step keeps.
    settings = BOUNDED | {"target": 1.0, "limit": 1.0}
    options = {"steps": 4, "settings": settings, "probes": 1, "frozen": only_head if frozen else None}
    run = unlearn("EUPMU", task, params, digits.forget, digits.retain, directory=tmp_path, **options)
    chex.assert_trees_all_equal_structs(run.params, params)
    model = nnx.merge(graph, run.params, rest)
    assert model(digits.forget["inputs"]).shape == (len(digits.forget["labels"]), 10)
    assert np.any(model.head.kernel[...] != params["head"]["kernel"][...])
    assert np.all(model.hidden.kernel[...] == params["hidden"]["kernel"][...]) == frozen
    again = unlearn("EUPMU", task, params, digits.forget, digits.retain, directory=tmp_path, **options)
    chex.assert_trees_all_equal(again.params, run.params)


MESH_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from eupmu_jax import data, sharding, unlearn
from eupmu_jax.tasks import classification

digits = data.load("digits", seed=0)
tree = {"inputs": digits.train_images.reshape(-1, 64), "labels": digits.train_labels}
forget, retain = ({name: leaf[at] for name, leaf in tree.items()} for at in (tree["labels"] == 3, tree["labels"] != 3))
keys = jax.random.split(jax.random.key(0))
params = {"hidden": jax.random.normal(keys[0], (64, 256)) / 8, "head": jax.random.normal(keys[1], (256, 10)) / 16}
task = classification(lambda params, inputs: jnp.tanh(inputs @ params["hidden"]) @ params["head"], 10)
mesh = sharding.make_mesh(4, 2)
places = sharding.param_shardings(params, mesh)
assert tuple(places["hidden"].spec) == (None, "model")
options = {"steps": 10, "forget_batch": 16, "retain_batch": 48, "probes": 1}
for method, more in (("EUPMU", {"target": 1.0, "limit": 1.0}), ("EUPMU implicit", {"multiplier_learning_rate": 1.0})):
    settings = {"learning_rate": 0.003, "forget_objective": "bounded_ascent"} | more
    run = lambda params, mesh: unlearn(method, task, params, forget, retain, settings=settings, mesh=mesh, **options)
    one = run(params, None)
    for given in (jax.device_put(params, jax.devices()[0]), jax.device_put(params, places)):
        many = run(given, mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, many.params) == places, method
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, err_msg=method), many.params, one.params)
        for name in ("forget_loss", "retain_loss"):
            np.testing.assert_allclose(many.history[name], one.history[name], rtol=1e-4, err_msg=method)
    assert np.max(np.abs(one.params["head"] - params["head"])) > 1e-3
"""


@pytest.mark.slow
def test_eight_devices_give_what_one_gives_and_parameters_stay_where_they_lie():
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    devices |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT], env=os.environ | devices, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


# Runs that are stopped.


class Stopped(Exception):  # noqa: N818
    """What the user's own callback raised."""


def stop(count, action):
    """A callback that does something after so many steps."""
    made = []

    def on_step():
        made.append(1)
        if len(made) == count:
            action()

    return on_step


def raise_stopped():
    raise Stopped


def assert_same(run, whole):
    chex.assert_trees_all_equal(run.params, whole.params)
    for name, values in whole.history.items():
        np.testing.assert_array_equal(run.history[name], values)
    assert run.figures == whole.figures
    assert run.share == whole.share


@pytest.mark.slow
@pytest.mark.parametrize("method", ["EUPMU", "EUPMU implicit", "random labels"])
def test_interrupted_and_called_again_it_is_the_same_to_the_bit(digits, method, tmp_path):
    run = functools.partial(digits.unlearn, method, probes=4, save_every=5)
    whole = run()
    with pytest.raises(Stopped):
        run(directory=tmp_path, on_step=stop(8, raise_stopped))
    made = []
    assert_same(run(directory=tmp_path, on_step=lambda: made.append(1)), whole)
    assert len(made) == 7
    assert_same(run(directory=tmp_path, on_step=lambda: pytest.fail("made a step")), whole)


def test_sigterm_ends_a_run_that_can_go_on(digits, tmp_path):
    whole = digits.unlearn("weighted sum")
    on_step = stop(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedError, match=rf"^SIGTERM after step [67], which is saved in {tmp_path}; call again"):
        digits.unlearn("weighted sum", directory=tmp_path, on_step=on_step)
    made = []
    assert_same(digits.unlearn("weighted sum", directory=tmp_path, on_step=lambda: made.append(1)), whole)
    assert len(made) in (5, 6)


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    """Where the checkpoints of a run of the weighted sum lie."""
    directory = tmp_path_factory.mktemp("saved")
    digits.unlearn("weighted sum", directory=directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": SETTINGS["weighted sum"] | {"retain_weight": 2.0}}, "settings"),
        ({"seed": 1}, "seed 1"),
        ({"steps": 13}, "steps 13"),
        ({"retain_batch": 49}, "batches"),
        ({"method": "EUPMU explicit"}, "method 'EUPMU explicit'"),
        ({"forget": lambda tree: {name: leaf[:-1] for name, leaf in tree.items()}}, "forget"),
        ({"retain": lambda tree: tree | {"labels": tree["labels"][::-1]}}, "retain"),
        ({"params": lambda tree: tree | {"bias": tree["bias"] + 1}}, "params"),
        ({"params": lambda tree: tree | {"head": tree["head"][:, :9], "bias": tree["bias"][:9]}}, "params"),
        ({"params": lambda tree: tree | {"more": tree["bias"]}}, "params"),
        ({"frozen": FROZEN}, "params"),
    ],
)
def test_a_directory_of_another_run_is_refused(digits, saved, changes, named):
    options = {"steps": 12, "forget_batch": 16, "retain_batch": 48, "probes": 0} | changes
    method = options.pop("method", "weighted sum")
    options = {"settings": SETTINGS[method]} | options
    same = lambda tree: tree
    given = [options.pop(name, same)(getattr(digits, name)) for name in ("params", "forget", "retain")]
    on_step = lambda: pytest.fail("made a step")
    with pytest.raises(ValueError, match=rf"^directory: .* holds another run; got .*\b{named}"):
        unlearn(method, TASK, *given, directory=saved, on_step=on_step, **options)


# What is refused before any step.


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
        r"settings: got 'tolerance', which weighted sum does not read; expected some of learning_rate, ",
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
    "an unknown optimizer": (
        {"settings": WEIGHTED | {"optimizer": "lion"}},
        r"optimizer: got 'lion', expected 'adam' or 'sgd'",
    ),
    "no forget loss": (
        {"settings": without(WEIGHTED, "forget_objective")},
        r"settings: got \{.*\}, expected 'forget_objective' among them too",
    ),
    "no weight": (
        {"settings": without(WEIGHTED, "retain_weight")},
        r"settings: got \{.*\}, expected 'retain_weight' among them too",
    ),
    "no fraction to prepare with": (
        {"method": "SalUn", "settings": BOUNDED},
        r"settings: got \{.*\}, expected 'mask_fraction' among them too",
    ),
    "an empty forget set": ({"forget": lambda d: of_length(d.forget, inputs=0, labels=0)}, r"forget: got an empty set"),
    "an empty retain set": ({"retain": lambda d: of_length(d.retain, inputs=0, labels=0)}, r"retain: got an empty set"),
    "an empty source": ({"forget": lambda d: Store({"labels": []})}, r"forget: got an empty set"),
    "nothing held out": ({"held_out": lambda d: Examples(d.tree, np.array([]))}, r"held_out: got an empty set"),
    "leaves of unequal length": (
        {"retain": lambda d: of_length(d.retain, labels=7)},
        r"retain: leaves have leading axes .*\(7,\).*, expected one number of examples in all",
    ),
    "a leaf without examples": (
        {"forget": lambda d: d.forget | {"weight": np.float32(1)}},
        r"forget: leaves have leading axes .*\(\).*, expected one number of examples in all",
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
        r"forget: got dict, which gives no batch for an array of positions; expected a tree of arrays",
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
        r"retain: got examples .*, expected those of the forget set",
    ),
    "another shape": (
        {"retain": lambda d: d.retain | {"inputs": d.retain["inputs"][:, :63]}},
        r"retain: got examples .*, expected those of the forget set",
    ),
    "another type": (
        {"retain": lambda d: d.retain | {"labels": d.retain["labels"] * 1.0}},
        r"retain: got examples .*, expected those of the forget set",
    ),
    "another structure held out": (
        {"held_out": lambda d: without(d.held_out, "labels")},
        r"held_out: got examples .*, expected those of the forget set",
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
        r"settings\['learning_rate'\]: got -0\.1, expected a number >= 0",
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
        r"frozen: got structure .*, expected that of params, ",
    ),
    "everything frozen": (
        {"frozen": dict.fromkeys(FROZEN, True)},
        r"frozen: every leaf is frozen, expected at least one trainable leaf",
    ),
}


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


def test_a_mesh_that_cannot_share_out_a_batch_is_told(digits):
    with pytest.raises(ValueError, match=r"^devices: got 1, expected at least 2"):
        digits.unlearn("weighted sum", mesh=make_mesh(jax.device_count() + 1))


def test_an_unknown_forget_objective_lists_the_known():
    with pytest.raises(ValueError, match=r"^forget_objective: got 'kindness', expected one of bounded_ascent, "):
        loss_of(TASK, "kindness")
