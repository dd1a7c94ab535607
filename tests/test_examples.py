"""Runs what the README and the docstrings recommend on an ordinary model that was trained to convergence."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import eupmu_jax as eupmu

ALLOWED_RISE = 0.02


def apply(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def retain_loss(params, batch):
    return eupmu.objectives.cross_entropy(apply(params, batch["x"]), batch["y"])


def forget_loss(params, batch):
    return eupmu.objectives.bounded_ascent(apply(params, batch["x"]), batch["y"])


def draw(key, data, size):
    chosen = jax.random.randint(key, (size,), 0, len(data["y"]))
    return jax.tree.map(lambda leaf: leaf[chosen], data)


@pytest.fixture(scope="module")
def digits():
    """1,400 digits, and a model trained on them."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1400]
    data = {"x": jnp.asarray(x[order] / 16, jnp.float32), "y": jnp.asarray(y[order], jnp.int32)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (64, 128)) * 0.18,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(keys[1], (128, 10)) * 0.09,
        "b2": jnp.zeros(10),
    }
    optimizer = optax.adam(1e-3)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(retain_loss)(params, draw(key, data, 64)), state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    params = train((params, optimizer.init(params)), jax.random.split(keys[2], 1500))
    assert accuracy(params, data) > 99
    return params, data


def accuracy(params, data):
    return 100 * float(jnp.mean(jnp.argmax(apply(params, data["x"]), -1) == data["y"]))


def split(data, forgotten):
    if forgotten == "a class":
        mask = np.asarray(data["y"]) == 3
    else:
        mask = np.random.default_rng(1).permutation(len(data["y"])) < len(data["y"]) // 10
    return [jax.tree.map(lambda leaf, rows=rows: leaf[rows], data) for rows in (mask, ~mask)]


def explicit(limit):
    surgery = eupmu.unilateral_surgery(eupmu.tolerances.budget(limit, learning_rate=1e-3), retain_weight=1.5)
    optimizer = optax.chain(surgery, optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return eupmu.skip_nonfinite(optimizer), eupmu.explicit_step


def implicit(limit):
    surgery = eupmu.implicit_surgery(
        eupmu.tolerances.budget(limit, 1.0),
        eupmu.controllers.nu_pi(proportional=20.0, integral=2.0),
        proxy="level",
        initial_multiplier=1.5,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), surgery)
    return eupmu.skip_nonfinite(optimizer), eupmu.implicit_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "forgotten"), [(explicit, "a class"), (explicit, "10 % at random"), (implicit, "10 % at random")]
)
def test_the_recommended_run_forgets_and_keeps_the_limit(digits, make, forgotten):
    start, data = digits
    forget, retain = split(data, forgotten)
    measure = jax.jit(lambda params: retain_loss(params, retain))  # On the whole retain set.
    limit = measure(start) + ALLOWED_RISE
    optimizer, make_step = make(limit)
    step = make_step([forget_loss, retain_loss], optimizer)

    @jax.jit
    def advance(params, state, key):
        keys = jax.random.split(key)
        return step(params, state, (draw(keys[0], forget, 32), draw(keys[1], retain, 96)))

    params, state = start, optimizer.init(start)
    for key in jax.random.split(jax.random.key(0), 100):
        params, state, _ = advance(params, state, key)
    found = eupmu.furthest_feasible(measure, limit, inside=start, outside=params)

    assert measure(params) <= limit + 2 * ALLOWED_RISE  # The steps overshoot little, so little has to be undone.
    assert found.t > 0.5
    assert measure(found.params) <= limit
    np.testing.assert_allclose(found.levels, measure(found.params), rtol=1e-5)
    assert accuracy(found.params, retain) > 98
    assert accuracy(found.params, forget) < (5 if forgotten == "a class" else 97)
    assert optax.tree_utils.tree_get(state, "nonfinite_count") == 0


def as_task_batch(data):
    return {"inputs": data["x"], "labels": data["y"]}


@pytest.mark.slow
def test_the_code_blocks_of_the_readme_forget_a_class_and_keep_the_limit(digits):
    """The blocks run unchanged, given the names that the README leaves to the reader."""
    start, data = digits
    forget, retain = split(data, "a class")
    keys = jax.random.split(jax.random.key(0), 200)
    names = {
        "apply": apply,
        "params": start,
        "forget": as_task_batch(forget),
        "retain": as_task_batch(retain),
        "held_out": as_task_batch(retain),
        "loss": lambda params, batch: eupmu.objectives.cross_entropy(apply(params, batch["inputs"]), batch["labels"]),
        "forget_loss": lambda params, batch: eupmu.objectives.bounded_ascent(
            apply(params, batch["inputs"]), batch["labels"]
        ),
        "batches": [
            tuple(as_task_batch(draw(key, part, n)) for part, n in ((forget, 32), (retain, 96))) for key in keys
        ],
    }
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    own_model, twenty_lines = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(own_model, names)
    before, after = (names["result"].figures[name] for name in ("original", "returned"))
    assert before["forget_error"] < 0.01 < 0.5 < after["forget_error"]
    assert after["retain_loss"] < before["retain_loss"] + 0.04
    assert names["result"].share > 0.5
    exec(twenty_lines, names)
    assert names["measure"](names["params"]) <= names["limit"]
    assert accuracy(names["params"], forget) < 20
    assert accuracy(names["params"], retain) > 97
