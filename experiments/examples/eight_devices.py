"""A run on eight devices simulated on one CPU; the same code runs on eight real ones.

Time: about 20 seconds on 2 cores. Run it as a whole, in a fresh interpreter: python eight_devices.py
"""

# %% [markdown]
# The number of devices is fixed when JAX starts.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import eupmu_jax as eupmu
from eupmu_jax import sharding

pixels, digits = load_digits(return_X_y=True)
data = {"inputs": (pixels / 16).astype(np.float32), "labels": digits.astype(np.int32)}
forget, retain = ({name: array[part] for name, array in data.items()} for part in (digits == 3, digits != 3))


def apply(params, inputs):
    return jax.nn.relu(inputs @ params["hidden"]) @ params["out"]


# %% [markdown]
# A trained model. Its hidden layer is large enough to be sharded (at least 16,384 weights).

# %%
keys = jax.random.split(jax.random.key(0))
params = {"hidden": jax.random.normal(keys[0], (64, 512)) / 8, "out": jax.random.normal(keys[1], (512, 10)) / 23}
task = eupmu.tasks.classification(apply, num_classes=10)
optimizer = optax.adam(2e-3)


@jax.jit
def trained(params):
    def step(carry, _):
        gradient = jax.grad(lambda p: task.retain(task.outputs(p, data, None), data))(carry[0])
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]


original = trained(params)

# %% [markdown]
# A mesh of 4 x 2 devices: examples are split four ways along `data`, parameters two ways along `model`. `unlearn` lays
# out parameters, optimizer state and batches, and the result equals that of one device to rounding.

# %%
mesh = sharding.make_mesh(data=4, model=2)
options = {"steps": 60, "forget_batch": 16, "retain_batch": 48, "probes": 1}
on_mesh = eupmu.unlearn("EUPMU", task, original, forget, retain, mesh=mesh, **options)
alone = eupmu.unlearn("EUPMU", task, original, forget, retain, **options)
print(on_mesh.params["hidden"].sharding)

# %%
assert {shard.data.shape for shard in on_mesh.params["hidden"].addressable_shards} == {(64, 256)}
for name in params:
    np.testing.assert_allclose(on_mesh.params[name], alone.params[name], rtol=1e-3, atol=1e-4)
accuracy = lambda part: float((jnp.argmax(apply(on_mesh.params, part["inputs"]), 1) == part["labels"]).mean())
print(f"threes: {accuracy(forget):.3f}, others: {accuracy(retain):.3f}")
assert accuracy(forget) < 0.3
assert accuracy(retain) > 0.95
