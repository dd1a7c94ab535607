"""Chaining the surgery into an existing training loop.

Time: about 10 seconds on 2 cores. Run it cell by cell in an editor, or as a whole: python training_loop.py
"""

# %% [markdown]
# You have a model, a loss, an optimizer and a loop. Here they are a small network on scikit-learn's digits.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eupmu_jax as eupmu

pixels, digits = load_digits(return_X_y=True)
data = {"x": jnp.asarray(pixels / 16, jnp.float32), "y": jnp.asarray(digits)}


def logits(params, batch):
    return jax.nn.relu(batch["x"] @ params["hidden"]) @ params["out"]


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"]).mean()


def batch_of(rng, ids, size):
    chosen = rng.choice(ids, size)
    return {name: array[chosen] for name, array in data.items()}


def accuracy(params, ids):
    chosen = {name: array[ids] for name, array in data.items()}
    return float((logits(params, chosen).argmax(1) == chosen["y"]).mean())


rng, ids = np.random.default_rng(0), np.arange(len(digits))
keys = jax.random.split(jax.random.key(0))
params = {"hidden": jax.random.normal(keys[0], (64, 128)) / 8, "out": jax.random.normal(keys[1], (128, 10)) / 11}
optimizer = optax.adam(2e-3)
state = optimizer.init(params)


@jax.jit
def step(params, state, batch):
    updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


for _ in range(1_500):
    params, state = step(params, state, batch_of(rng, ids, 64))
original = params
print(f"trained: {accuracy(params, ids):.3f}")

# %% [markdown]
# To forget the threes, three things change. The step takes two batches, forget and retain. There is a forget loss, here
# ascent that stops once an example is no longer known. And the chain starts with the surgery, which changes the forget
# gradient so that the loss on retained examples stays within a limit. The rest of the chain is your optimizer.

# %%
forget, retain = ids[digits == 3], ids[digits != 3]
LEARNING_RATE, STEPS = optax.linear_schedule(1e-3, 0.0, 200), 200


def forget_loss(params, batch):
    return eupmu.objectives.bounded_ascent(logits(params, batch), batch["y"])


everything = {name: array[retain] for name, array in data.items()}
limit = float(loss(params, everything)) + 0.02
surgery = eupmu.unilateral_surgery(eupmu.tolerances.budget(limit, learning_rate=LEARNING_RATE), retain_weight=1.5)
optimizer = eupmu.skip_nonfinite(optax.chain(surgery, optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE)))
state = optimizer.init(params)
step = jax.jit(eupmu.explicit_step([forget_loss, loss], optimizer))

for _ in range(STEPS):
    batches = batch_of(rng, forget, 16), batch_of(rng, retain, 48)
    params, state, losses = step(params, state, batches)
print(f"threes: {accuracy(params, forget):.3f}, others: {accuracy(params, retain):.3f}")

# %% [markdown]
# So far the limit was kept on minibatches, and to first order. A measured end makes it hold on the whole retain set: it
# returns the furthest point on the path from the original parameters that was measured to keep the limit.

# %%
found = eupmu.furthest_feasible(lambda p: loss(p, everything), limit, inside=original, outside=params)
params = found.params
print(f"kept {float(found.t):.2f} of the way; retain loss {float(loss(params, everything)):.4f}, limit {limit:.4f}")
print(f"threes: {accuracy(params, forget):.3f}, others: {accuracy(params, retain):.3f}")

# %%
assert loss(params, everything) <= limit
assert accuracy(params, forget) < 0.2
assert accuracy(params, retain) > 0.97
