"""A Flax NNX model with BatchNorm and dropout forgets some of its digits.

Time: about a minute on 2 cores. Run it cell by cell in an editor, or as a whole: python flax_model.py
"""

# %% [markdown]
# A model as it is trained: BatchNorm keeps running statistics, and dropout takes a key.

# %%
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eupmu_jax as eupmu

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
order = np.random.default_rng(0).permutation(len(labels))
at = lambda ids: {"inputs": images[ids], "labels": jnp.asarray(labels[ids])}
forget, retain, held_out = map(at, np.split(order, [100, 400]))


class Convnet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.hidden = nnx.Linear(32 * 16, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x, key=None):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.out(self.dropout(x, deterministic=key is None, rngs=None if key is None else nnx.Rngs(key)))


@nnx.jit
def train_step(model, optimizer, batch, key):
    loss = lambda model: eupmu.objectives.cross_entropy(model(batch["inputs"], key), batch["labels"])
    optimizer.update(model, nnx.grad(loss)(model))


model = Convnet(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for step in range(200):
    batch = at(np.random.default_rng(step).choice(order[:400], 100))
    train_step(model, optimizer, batch, jax.random.key(step))

# %% [markdown]
# The model as a function of its parameters, in evaluation mode. The statistics are in `rest`: among the parameters,
# every method would train them.

# %%
model.eval()
graph, params, rest = nnx.split(model, nnx.Param, ...)


def apply(params, inputs, key=None):
    return nnx.merge(graph, params, rest)(inputs, key)


task = eupmu.tasks.classification(apply, num_classes=10)

# %% [markdown]
# For dropout while unlearning, `outputs` passes on the key of the step. It is None wherever a model is evaluated.

# %%
task = task._replace(outputs=lambda params, batch, key: apply(params, batch["inputs"], key))
result = eupmu.unlearn("EUPMU", task, params, forget, retain, held_out, progress=True)
print(f"error on forgotten digits: {result.level.forget_error:.3f}, target: {result.level.target:.3f}")

# %% [markdown]
# The parameters go back into the model. Its statistics are those of training: only the parameters were changed.

# %%
nnx.update(model, result.params)
for name, part in {"forgotten": forget, "retained": retain, "unseen": held_out}.items():
    wrong = jnp.argmax(model(part["inputs"]), -1) != part["labels"]
    print(f"error on {name} digits: {float(jnp.mean(wrong)):.3f}")
