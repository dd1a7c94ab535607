"""A task of your own: a regression model forgets some of its points.

Time: about 10 seconds on 2 cores. Run it cell by cell in an editor, or as a whole: python own_task.py
"""

# %% [markdown]
# A task is a tuple of pure functions over batches, which may be any pytrees. `outputs` is one forward pass, `retain` is
# the utility loss, and `forget` maps names to losses that unlearning may descend on. Most methods need nothing else; a
# divergence, an error measure and fresh parameters are optional.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import eupmu_jax as eupmu

features, progression = load_diabetes(return_X_y=True, scaled=True)
x = jnp.asarray(features / features.std(0), jnp.float32)
y = jnp.asarray((progression - progression.mean()) / progression.std(), jnp.float32)


def outputs(params, batch, key):
    del key  # drives dropout or noise, if the model has any
    return jnp.tanh(batch["x"] @ params["hidden"]) @ params["out"]


def squared_error(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def bounded_ascent(outputs, batch, bound=1.0):
    """Ascent that stops for a point once its error is that of guessing the mean, the variance of 1."""
    return jnp.mean(jnp.maximum(bound - (outputs - batch["y"]) ** 2, 0))


def fresh_params(key):
    keys = jax.random.split(key)
    return {"hidden": jax.random.normal(keys[0], (10, 256)) / 3, "out": jax.random.normal(keys[1], (256,)) / 16}


task = eupmu.Task(
    outputs=outputs,
    retain=squared_error,
    forget={"bounded_ascent": bounded_ascent, "gradient_ascent": lambda out, batch: -squared_error(out, batch)},
    divergence=lambda out, other: jnp.mean((out - other) ** 2),
    error=lambda out, batch: jnp.abs(out - batch["y"]),
    fresh_params=fresh_params,
)

# %% [markdown]
# A model that has memorised its points. Train yours however you like.

# %%
optimizer = optax.adam(3e-3)
held_out, forget, retain = np.split(np.random.default_rng(0).permutation(len(y)), [80, 110])
at = lambda ids: {"x": x[ids], "y": y[ids]}


@jax.jit
def fitted(params, batch):
    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: task.retain(task.outputs(p, batch, None), batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=3_000)[0][0]


original = fitted(fresh_params(jax.random.key(0)), at(np.concatenate([forget, retain])))

# %% [markdown]
# Any method runs on it. "EUPMU" forgets until the error is that of data that the model never saw, while the error on
# the retain set rises by at most a tenth of that increase. It needs no settings, whatever the unit of the error. The
# figures show the forget set, the retain set and the held-out data.

# %%
result = eupmu.unlearn("EUPMU", task, original, at(forget), at(retain), at(held_out), progress=True)

# %%
level = result.level
assert level.kept
assert abs(level.forget_error - level.target) < 0.2 * level.target

# %% [markdown]
# If a method needs something that the task lacks, it says so before any work.

# %%
try:
    eupmu.unlearn("boundary shrink", task, original, at(forget), at(retain))
except ValueError as error:
    print(error)
