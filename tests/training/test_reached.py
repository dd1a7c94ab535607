"""How runs of EUPMU use levels: the target, the limit, the end that is returned and what is said about it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eupmu_jax as eupmu
from eupmu_jax import data, tasks
from eupmu_jax.objectives import diffusion
from eupmu_jax.tasks import Task, as_examples
from eupmu_jax.training import _warn, fitting
from eupmu_jax.training._aim import Aim, _mixed, aim_of
from eupmu_jax.training._inputs import Sets
from eupmu_jax.training._reached import Reached, reached, within
from eupmu_jax.training.levels import Level
from eupmu_jax.training.mesh.placement import Carry

from .test_levels import GUESS, labelled


class Digits:
    """A network that has memorised 300 digits, and digits that it was not trained on."""

    def __init__(self):
        loaded = data.load("digits", seed=0)
        flat = lambda images, labels: {"inputs": images.reshape(len(images), 64), "labels": labels}
        train = flat(loaded.train_images[:300], loaded.train_labels[:300])
        unseen = flat(loaded.train_images[300:], loaded.train_labels[300:])
        self.known = train
        self.held_out, self.test = (jax.tree.map(lambda leaf, p=part: leaf[p::2], unseen) for part in (0, 1))
        keys = jax.random.split(jax.random.key(0))
        start = {"a": jax.random.normal(keys[0], (64, 128)) / 8, "b": jax.random.normal(keys[1], (128, 10)) / 12}
        self.task = tasks.classification(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], num_classes=10)
        options = {"epochs": 60, "batch_size": 50, "learning_rate": 3e-3, "seed": 0}
        self.params = fitting.fit_task(self.task, start, as_examples("train", train), **options).params

    def sets(self, is_forgotten):
        return [jax.tree.map(lambda leaf, at=at: leaf[at], self.known) for at in (is_forgotten, ~is_forgotten)]

    def aim(self, is_forgotten, held_out):
        sets = Sets(*(as_examples("set", part) for part in self.sets(is_forgotten)), None)
        held_out = None if held_out is None else as_examples("held_out", held_out)
        return aim_of(self.task, self.params, sets, held_out, None)

    def unlearn(self, is_forgotten, **options):
        forget, retain = self.sets(is_forgotten)
        options = {"steps": 100, "forget_batch": 30, "retain_batch": 90, "probes": 1} | options
        params = options.pop("params", self.params)
        return eupmu.unlearn("EUPMU", self.task, params, forget, retain, **options)


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.parametrize("learning_rate", [pytest.param(3e-4, marks=pytest.mark.slow), 1e-2])
def test_a_random_forget_set_ends_up_like_unseen_data(digits, learning_rate):
    settings = {"learning_rate": learning_rate}
    run = digits.unlearn(np.arange(300) < 60, held_out=digits.held_out, settings=settings, probes=10)
    level = eupmu.unseen_level(digits.task, digits.params, digits.held_out)
    assert run.level.source == "unseen data by class"
    assert run.level.unseen == level
    assert run.level.kept
    history = run.history
    # The weight of a step follows the error before it. Long steps pass the level before the first measurement.
    assert history["weight"][0] == 0
    assert (max(history["weight"]) > 0) == (learning_rate < 1e-3)
    assert history["forget_error"][-1] == pytest.approx(run.figures["last"]["forget_error"])
    assert run.level.comparison.low < 0 < run.level.comparison.high
    # These are errors on 60 examples, all of which the original model knows.
    assert run.figures["original"]["forget_error"] < 0.02
    assert 0.02 < run.level.forget_error < 0.25
    assert eupmu.unseen_level(digits.task, run.params, digits.test).error < 1.5 * level.high


def test_a_partly_retained_class_has_its_own_level(digits):
    of_class = digits.known["labels"] == 8
    aim = digits.aim(of_class & (np.arange(300) % 2 == 0), digits.held_out)
    levels = eupmu.unseen_levels(digits.task, digits.params, digits.held_out, digits.held_out["labels"])
    assert aim.target == pytest.approx(levels[8].error)
    # With one class, the interval is that of its own level.
    assert aim.interval == pytest.approx(levels[8][1:3])


@pytest.mark.parametrize(("wrong", "kept"), [(30, True), (31, False)])
def test_whether_a_limit_is_kept_is_measured_on_the_whole_retain_set(wrong, kept):
    # BUG: of more than 2,000 examples only a part was measured, whose sampling error excused a point above the limit.
    sets = Sets(
        as_examples("forget", labelled([0, 1])),
        as_examples("retain", labelled([0] * (3_000 - wrong) + [1] * wrong)),
        None,
    )
    aim, start, settings = Aim(0.5, "settings", None, 0), {"retain_error": 0.0}, {"limit": 0.01}
    assert reached(GUESS, 1.0, 1.0, sets, None, aim, start, settings).kept is kept


def test_without_held_out_data_the_target_is_chance_and_a_warning_says_so(digits, caplog):
    aim = digits.aim(np.arange(300) < 30, None)
    assert (aim.target, aim.source) == (pytest.approx(0.9), "chance")
    assert "held_out: got None, so the error on unseen data is not known" in caplog.text


def test_few_held_out_examples_are_warned_about(digits, caplog):
    digits.aim(np.arange(300) < 30, jax.tree.map(lambda leaf: leaf[:20], digits.held_out))
    assert "held_out: got 20 examples, whose error of" in caplog.text


@pytest.mark.slow
def test_a_class_of_few_unseen_examples_gets_the_level_of_all_with_a_warning(digits, caplog):
    # BUG: silently, its level was that of a single example, and its interval that of all held-out data.
    labels = digits.held_out["labels"]
    kept = (labels != 8) | (np.cumsum(labels == 8) <= 4)
    held_out = jax.tree.map(lambda leaf: leaf[kept], digits.held_out)
    is_forgotten = (digits.known["labels"] == 8) & (np.arange(300) % 2 == 0)
    aim = digits.aim(is_forgotten, held_out)
    assert "held_out: got fewer than 5 examples of 1 of the 1 classes in the forget set" in caplog.text
    assert (aim.target, aim.interval) == (aim.level.error, pytest.approx(aim.level[1:3]))
    half = np.isin(digits.known["labels"], [2, 8]) & ((digits.known["labels"] == 8) | (np.arange(300) % 2 == 0))
    both = digits.aim(half, digits.held_out)
    two = eupmu.unseen_levels(digits.task, digits.params, digits.held_out, digits.held_out["labels"])[2]
    share = np.mean(digits.known["labels"][half] == 2)
    # BUG: classes that share the level of all data were treated as independent, so the interval was too narrow.
    held_out = jax.tree.map(lambda leaf: leaf[~np.isin(labels, [2, 5, 8])], digits.held_out)
    lacking = np.isin(digits.known["labels"], [2, 5, 8]) & (np.arange(300) % 2 == 0)
    shared = digits.aim(lacking, held_out)
    assert (shared.target, *shared.interval) == pytest.approx(shared.level[:3])
    # Class 8 is forgotten entirely, so its target of 1 has no uncertainty.
    assert both.target == pytest.approx(1 - share + share * two.error)
    assert both.interval == pytest.approx([1 - share + share * two.low, 1 - share + share * two.high])


@pytest.mark.slow
def test_a_target_and_a_limit_can_be_set(digits):
    settings = {"target": 0.3, "limit": 0.5, "allowed_rise": 10.0}
    run = digits.unlearn(np.arange(300) < 60, settings=settings)
    assert (run.level.target, run.level.source, run.level.limit) == (0.3, "settings", 0.5)
    assert 0.1 < run.level.forget_error < 0.5


@pytest.mark.slow
def test_a_limit_in_nats_holds_at_the_measured_end(digits):
    settings = {"learning_rate": 0.03, "allowed_rise": 1e-3, "target": 0.9}
    run = digits.unlearn(np.arange(300) < 150, settings=settings)
    rise = run.figures["returned"]["retain_loss"] - run.figures["original"]["retain_loss"]
    assert rise < 2e-3


def test_a_limit_in_nats_that_is_exceeded_on_the_whole_set_is_not_kept(digits, caplog):
    # BUG: without a limit on the error it counted as kept whatever the loss.
    sets = Sets(*(as_examples(name, digits.known) for name in ("forget", "retain")), None)
    aim, start = Aim(0.5, "settings", None, 0), {"retain_error": 0.0, "retain_loss": 0.01}
    worse = jax.tree.map(lambda leaf: 0.5 * leaf, digits.params)
    ends = {}
    for rise in (1e-3, 10.0):
        found = reached(digits.task, worse, digits.params, sets, None, aim, start, {"allowed_rise": rise})
        _warn.of_end(Carry(worse, (), jax.random.key(0)), worse, 1, found, start)
        ends[rise] = found.kept, found.limit
    assert ends == {1e-3: (False, np.inf), 10.0: (True, np.inf)}
    # BUG: the warning spoke of the error, which had no limit.
    assert caplog.text.count("retain: the ") == 1
    assert "retain: the loss rose by more than settings['allowed_rise'] on the whole retain set" in caplog.text


@pytest.mark.parametrize(("begun", "ended", "far"), [(0.9, 1.1, True), (0.9, 1.3, False), (1.6, 1.55, False)])
def test_an_end_is_far_from_the_target_only_below_it(caplog, begun, ended, far):
    # BUG: a run that began above its target and ended there too was said to be far from it.
    level = Reached(1.5, "settings", None, ended, 0.0, 0.0, np.inf, True, None)
    _warn.of_end(Carry({}, (), jax.random.key(0)), {}, 1, level, {"forget_error": begun})
    assert ("far from the target" in caplog.text) == far


@pytest.mark.parametrize("name", ["limit", "allowed_error"])
def test_limits_given_in_percentage_points_are_refused(digits, name):
    # BUG: 3, meant as three points, amounted to no limit, and the model was destroyed.
    with pytest.raises(
        ValueError, match=rf"^settings\['{name}'\]: got 3, expected a share of at most 1; 0.01 is one point"
    ):
        digits.unlearn(np.arange(300) < 30, settings={name: 3})


@pytest.mark.slow
def test_a_limit_below_the_start_cannot_be_kept_and_a_warning_says_so(digits, caplog):
    # The original model is above the limit already.
    damaged = jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(jax.random.key(0), leaf.shape), digits.params)
    settings = {"target": 0.5, "limit": 0.0, "learning_rate": 1e-5}
    run = digits.unlearn(np.arange(300) < 60, settings=settings, steps=2, params=damaged)
    assert run.level.start > 0
    assert not run.level.kept
    assert "retain: the limit of 0 is not kept on the whole retain set, whose error went from" in caplog.text


@pytest.mark.parametrize(("target", "wanted"), [(-0.1, "a finite number >= 0"), (1.2, "an error rate from 0 to 1")])
def test_a_target_that_is_not_an_error_rate_is_refused(digits, target, wanted):
    with pytest.raises(ValueError, match=rf"^settings\['target'\]: got {target}, expected {wanted}"):
        digits.unlearn(np.arange(300) < 30, settings={"target": target})


@pytest.mark.slow
def test_without_held_out_data_the_target_is_what_the_task_calls_unknown():
    denoise = lambda params, x_t, t, labels: x_t * params["scale"] + params["shift"][labels]
    task = tasks.diffusion(denoise, diffusion.cosine_schedule(100), num_conditions=3)
    rng = np.random.default_rng(0)
    params = {"scale": jnp.float32(0.7), "shift": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
    make = lambda count: {"inputs": rng.uniform(-1, 1, (count, 5)).astype(np.float32), "labels": np.zeros(count, int)}
    forget, retain = make(40), make(80)
    run = eupmu.unlearn("EUPMU", task, params, forget, retain, steps=3, probes=1)
    errors, passes = task.unknown(params, forget)
    assert run.level.source == "unknown"
    np.testing.assert_allclose(run.level.target, np.mean(errors), rtol=1e-5)
    options = {"settings": {"target": run.level.target}, "steps": 3, "probes": 1}
    given = eupmu.unlearn("EUPMU", task, params, forget, retain, **options)
    assert run.forward - given.forward == passes * 40
    chex.assert_trees_all_equal(run.params, given.params)
    part = eupmu.unlearn("EUPMU", task, params, forget, retain, frozen={"scale": True, "shift": False}, steps=3)
    np.testing.assert_allclose(part.level.target, run.level.target, rtol=1e-6)
    assert part.params["scale"] == params["scale"]


@pytest.mark.slow
def test_errors_above_1_can_be_compared_too():
    rng = np.random.default_rng(0)
    make = lambda count: {"x": rng.normal(size=(count, 3)).astype(np.float32), "y": 9 + rng.normal(size=count)}
    loss = lambda outputs, batch: jnp.square(outputs - batch["y"])
    task = tasks.Task(
        outputs=lambda params, batch, key: batch["x"] @ params,
        retain=lambda outputs, batch: jnp.mean(loss(outputs, batch)),
        forget={"ascent": lambda outputs, batch: -jnp.mean(loss(outputs, batch))},
        error=loss,
    )
    sets = make(30), make(60), make(50)
    found = eupmu.unlearn("EUPMU", task, jnp.zeros(3), *sets, steps=2, settings={"allowed_error": 1.0}).level
    assert found.target > 1
    assert found.comparison is not None
    unaimed = eupmu.unlearn("EUPMU", task, jnp.zeros(3), *sets[:2], steps=2, settings={"allowed_error": 1.0}).level
    assert (unaimed.source, unaimed.comparison) == ("chance", None)


def test_a_class_to_be_forgotten_is_not_compared_even_with_a_target_from_the_settings():
    sets = Sets(as_examples("forget", labelled([2] * 9)), as_examples("retain", labelled([0, 1])), None)
    held_out, start = as_examples("held_out", labelled([0, 1, 2] * 9)), {"retain_error": 0.5}
    aim = aim_of(GUESS, 1.0, sets, held_out, 1.0)
    found = reached(GUESS, 1.0, 1.0, sets, held_out, aim, start, {"limit": 1.0})
    assert (found.source, found.comparison) == ("settings", None)


def test_without_held_out_data_a_class_to_be_forgotten_is_not_brought_to_chance():
    # BUG: the README says that such a class is forgotten entirely, but the target left one in ten recognised.
    sets = Sets(as_examples("forget", labelled([2, 2, 1, 1])), as_examples("retain", labelled([0, 1])), None)
    aim = aim_of(GUESS, 1.0, sets, None, None)
    assert (aim.target, aim.source) == (pytest.approx((1 + 2 / 3) / 2), "chance")


@pytest.mark.parametrize(("scale", "known"), [(0.01, False), (1.0, True)])
def test_small_errors_on_learned_data_do_not_make_1_the_level_of_chance(scale, known):
    # BUG: for a regression with errors below 1 on its data, 1 was taken for chance whatever the unit.
    inputs = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
    data = {"inputs": inputs, "targets": scale * (inputs[:, 0] > 0)}
    task = Task(
        outputs=lambda params, batch, key: batch["inputs"] @ params,
        retain=lambda outputs, batch: jnp.mean((outputs[:, 0] - batch["targets"]) ** 2),
        forget={"ascent": lambda outputs, batch: -jnp.mean((outputs[:, 0] - batch["targets"]) ** 2)},
        error=lambda outputs, batch: batch["targets"],
    )
    sets = Sets(*(as_examples("data", data) for _ in range(2)), None)
    found = aim_of(task, jnp.ones((1, 1)), sets, None, None)
    assert (found.target == 1.0) is known


@pytest.mark.parametrize(("count", "few"), [(4, True), (5, False)])
def test_a_class_needs_five_unseen_examples_for_a_level_of_its_own(count, few, caplog):
    sets = Sets(as_examples("forget", labelled([1, 1])), as_examples("retain", labelled([0, 1])), None)
    held_out = as_examples("held_out", labelled([0] * 95 + [1] * count))
    aim = aim_of(GUESS, 1.0, sets, held_out, None)
    assert aim.target == (pytest.approx(count / (95 + count)) if few else 1.0)
    assert ("held_out: got fewer than 5 examples of 1 of the 1 classes" in caplog.text) is few


@pytest.mark.parametrize(("retained", "warned"), [([1, 2], False), ([0, 1], True)])
def test_too_few_unseen_examples_are_not_blamed_for_a_level_that_they_have_no_part_in(retained, warned, caplog):
    # BUG: the spread of the errors without a condition was reported as that of the held-out examples.
    denoise = lambda params, x_t, t, labels: params[labels][:, None] * x_t
    task = tasks.diffusion(denoise, diffusion.cosine_schedule(100), num_conditions=3)
    make = lambda labels: {"inputs": np.zeros((len(labels), 2), np.float32), "labels": np.asarray(labels)}
    forget, retain, held_out = (as_examples("data", make(some)) for some in ([0] * 9, retained, [0] * 9))
    aim = aim_of(task, jnp.ones(4), Sets(forget, retain, None), held_out, None)
    assert aim.at_least is not warned
    assert ("held_out: got 9 examples, whose error of" in caplog.text) is warned


@pytest.mark.parametrize("limit", [-2.0, 0.0, 3.0])
def test_a_figure_equal_to_its_limit_is_within_it_whatever_its_sign(limit):
    assert within(limit, limit)
    assert not within(limit + 1e-4, limit)


def test_the_interval_of_a_mix_of_classes_adds_the_squares_of_their_parts():
    parts = [(Level(0.2, 0.1, 0.4, 50), 2), (Level(0.6, 0.5, 0.65, 50), 1)]
    below, above = np.hypot(0.2, 0.1) / 3, np.hypot(0.4, 0.05) / 3
    np.testing.assert_allclose(_mixed(parts, 100), [1 / 3, 1 / 3 - below, 1 / 3 + above, 100])
