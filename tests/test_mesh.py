"""Steps on a mesh of eight forced host devices equal those on one, and gather no gradient."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import eupmu_jax as eupmu

def loss(params, batch):
    logits = jnp.tanh(batch["x"] @ params["hidden"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

def batch(seed, size):
    x_key, y_key = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(x_key, (size, 64)), "y": jax.random.randint(y_key, (size,), 0, 8)}

kind, data, model = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
limited = eupmu.tolerances.budget(0.05, 1.0, relative_to_start=True)
optimizer = {
    "vmap": lambda: optax.chain(eupmu.unilateral_surgery(), optax.adam(1e-2)),
    "unroll": lambda: optax.chain(eupmu.unilateral_surgery(limited), optax.adam(1e-2)),
    "guard": lambda: eupmu.utility_guard(optax.adam(1e-2), limited),
    "owa": lambda: optax.chain(eupmu.aggregators.owa(), optax.adam(1e-2)),
    "implicit": lambda: eupmu.eupmu(0.1),
    "level": lambda: optax.chain(
        optax.adam(1e-2), eupmu.implicit_surgery(limited, eupmu.controllers.nu_pi(2.0, 1.0), proxy="level")
    ),
}[kind]()
optimizer = eupmu.skip_nonfinite(optimizer)
if kind in ("implicit", "level"):
    step = jax.jit(eupmu.implicit_step(loss, optimizer))
else:
    step = jax.jit(eupmu.explicit_step(loss, optimizer, mode="vmap" if kind == "vmap" else "unroll"))
keys = jax.random.split(jax.random.key(0))
params = {"hidden": jax.random.normal(keys[0], (64, 128)) / 8, "head": jax.random.normal(keys[1], (128, 8)) / 11}
batches = batch(1, 32), batch(2, 32 if kind == "vmap" else 288)

def run(params, batches):
    state = optimizer.init(params)
    program = step.lower(params, state, batches).compile()
    for _ in range(20):
        params, state, _ = program(params, state, batches)
    weights = optax.tree_utils.tree_get(state, "weights" if kind == "owa" else "multipliers")
    return params, weights, program.as_text()

mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
shardings = {"hidden": NamedSharding(mesh, P(None, "model")), "head": NamedSharding(mesh, P("model", None))}
one, multipliers, _ = run(params, batches)
many, mesh_multipliers, program = run(
    jax.device_put(params, shardings), jax.device_put(batches, NamedSharding(mesh, P("data")))
)
assert len(jax.devices()) == 8
assert many["hidden"].sharding.is_equivalent_to(shardings["hidden"], 2), many["hidden"].sharding
for name in one:
    np.testing.assert_allclose(many[name], one[name], atol=1e-5)
np.testing.assert_allclose(mesh_multipliers, multipliers, rtol=1e-3, atol=1e-5)
assert " all-gather(" not in program and " all-gather-start(" not in program
"""


@pytest.mark.parametrize("kind", ["vmap", "unroll", "guard", "owa", "implicit", "level"])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2)])
def test_eight_devices_equal_one(kind, data, model):
    flags = "--xla_force_host_platform_device_count=8"
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(data), str(model)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
