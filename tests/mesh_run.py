"""Runs twenty steps on one device and on meshes of eight, for `test_mesh.py`, and prints the results as JSON.

Run as a script, since the number of devices is fixed when JAX starts: `python mesh_run.py MESHES`, a JSON object whose
values are OBJECTIVE, DATA, MODEL, AXES and the kinds of step. All meshes share one process, so that the steps on one
device are compiled once.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eupmu_jax as eupmu
from eupmu_jax import sharding
from eupmu_jax.surgery.two_pass import two_pass
from eupmu_jax.training.mesh import program

# Half a nat below the start, so that the constraint binds from the first step on.
LIMITED = eupmu.tolerances.budget(-0.5, 1.0, relative_to_start=True)
SURGERY = eupmu.unilateral_surgery
FROZEN = {"hidden": False, "head": False, "bias": True}
AGGREGATORS = ("owa", "mean", "dualproj", "upgrad")
MORE_AGGREGATORS = {
    "pcgrad": eupmu.aggregators.pcgrad(seed=0, num_objectives=3),
    "cagrad": eupmu.aggregators.cagrad(num_objectives=3),
    "mgda": eupmu.aggregators.mgda(num_objectives=3),
    "imtl_g": eupmu.aggregators.imtl_g(num_objectives=3),
    "nash_mtl": eupmu.aggregators.nash_mtl(num_objectives=3),
    "aligned_mtl": eupmu.aggregators.aligned_mtl(num_objectives=3),
    "config": eupmu.aggregators.config(num_objectives=3),
    "ngdiff": eupmu.aggregators.ngdiff(num_objectives=3),
    "gdr_gma": eupmu.aggregators.gdr_gma(gamma=1.0, epsilon=5.0),
    "chebyshev": eupmu.aggregators.chebyshev(num_objectives=3),
    "omd_tch": eupmu.aggregators.omd_tch(num_objectives=3),
    "famo": eupmu.aggregators.famo(num_objectives=3),
}


def adam():
    # Where a gradient vanishes, Adam with a small eps would turn its rounding error into a step.
    return optax.adam(1e-2, eps=1e-4)


def loss(params, batch):
    logits = jnp.tanh(batch["x"] @ params["hidden"]) @ params["head"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


TWICE = two_pass(loss, adam(), LIMITED)

# Kind: the optimizer, how its step is made (None: implicit; a function: that function), and the batch sizes.
KINDS = {
    "explicit vmap": (eupmu.skip_nonfinite(optax.chain(SURGERY(), adam())), {"mode": "vmap"}, (32, 32)),
    "explicit unroll": (optax.chain(SURGERY(LIMITED), adam()), {"mode": "unroll"}, (32, 288)),
    "explicit of 3": (optax.chain(SURGERY(num_objectives=3), adam()), {"mode": "vmap"}, (32, 32, 32)),
    "explicit frozen": (eupmu.freeze(optax.chain(SURGERY(), adam()), FROZEN), {}, (32, 32)),
    "bfloat16": (optax.chain(SURGERY(), optax.sgd(0.1)), {"mode": "vmap", "gradient_dtype": jnp.bfloat16}, (32, 32)),
    "accumulate": (eupmu.accumulate(optax.chain(SURGERY(), adam()), 2), {"mode": "vmap"}, (32, 32)),
    "guard": (eupmu.utility_guard(adam(), LIMITED), {}, (32, 32)),
    "guard of muon": (eupmu.utility_guard(optax.contrib.muon(1e-2), LIMITED), {}, (32, 32)),
    "owa": (optax.chain(eupmu.aggregators.owa(), adam()), {"mode": "vmap"}, (32, 32)),
    "mean": (optax.chain(eupmu.aggregators.mean(), adam()), {"mode": "vmap"}, (32, 32)),
    "dualproj": (optax.chain(eupmu.aggregators.dualproj(), adam()), {}, (32, 288)),
    "upgrad": (optax.chain(eupmu.aggregators.upgrad(num_objectives=3), adam()), {"mode": "vmap"}, (32, 32, 32)),
    "two passes": (TWICE, TWICE.step, (32, 288)),
    "implicit": (eupmu.eupmu(0.1), None, (32, 32)),
    "implicit level": (
        optax.chain(adam(), eupmu.implicit_surgery(LIMITED, eupmu.controllers.nu_pi(2.0, 1.0), proxy="level")),
        None,
        (32, 288),
    ),
}
KINDS |= {
    name: (optax.chain(tx, adam()), {"mode": "vmap"}, (32, 32) if name == "gdr_gma" else (32, 32, 32))
    for name, tx in MORE_AGGREGATORS.items()
}


def make_batch(seed, size):
    """A batch with inputs shared by all objectives and labels of its own, so that the objectives conflict."""
    inputs = jax.random.normal(jax.random.key(0), (size, 64))
    return {"x": inputs, "y": jax.random.randint(jax.random.key(seed), (size,), 0, 128)}


def initial_params():
    keys = jax.random.split(jax.random.key(0))
    hidden, head = jax.random.normal(keys[0], (64, 256)) / 8, jax.random.normal(keys[1], (256, 128)) / 16
    return {"hidden": hidden, "head": head, "bias": jnp.zeros(128)}


def collectives(compiled):
    """Kind and result of each collective in a compiled program."""
    return [[found.kind, found.shape] for found in program.collectives(compiled.as_text())]


def run(kind, place):
    """The result of 20 steps, the row weights in each, and the compiled program; `place` shards the arguments."""
    optimizer, options, sizes = KINDS[kind]
    params, batches = initial_params(), tuple(make_batch(k + 1, size) for k, size in enumerate(sizes))
    params, state, batches, shardings, out = place(optimizer, params, optimizer.init(params), batches)
    if options is None:
        step = eupmu.implicit_step(loss, optimizer)
    elif callable(options):
        step = options
    else:
        step = eupmu.explicit_step(loss, optimizer, shardings=shardings, **options)
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(params, state, batches).compile()
    name, weights = "weights" if kind in (*AGGREGATORS, *MORE_AGGREGATORS) else "multipliers", []
    for _ in range(20):
        params, state, losses = compiled(params, state, batches)
        weights.append(jax.device_get(optax.tree_utils.tree_get(state, name)))  # The step donates its state.
    return {"params": params, "weights": np.stack(weights), "losses": losses}, compiled


def run_plain(mesh, axes):
    """The collectives of a plain step on as many examples, none of which come from surgery."""
    params, batch = initial_params(), make_batch(1, 64)
    shardings = sharding.param_shardings(params, mesh, axes=axes)

    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    params = jax.device_put(params, shardings)
    batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(params, batch).compile()


@functools.cache
def run_on_one(kind):
    return run(kind, lambda optimizer, *arguments: (*arguments, None, None))[0]


def on_mesh(objective, data, model, axes, kinds):
    """The results of these kinds of step on that mesh, and their distance from those on one device."""
    mesh, axes = sharding.make_mesh(data, model, objective), axes.split(",")
    by_objective = objective > 1

    def placed(optimizer, params, state, batches):
        shardings = sharding.param_shardings(params, mesh, axes=axes)
        state_shardings = sharding.state_shardings(optimizer, params, shardings)
        if by_objective:
            batches = eupmu.stack_objectives(*batches)
        batches = jax.device_put(batches, sharding.batch_shardings(batches, mesh, objective=by_objective))
        out = shardings, state_shardings, None
        return *jax.device_put((params, state), out[:2]), batches, shardings, out

    rows = {"plain": {"collectives": collectives(run_plain(mesh, axes))}}
    for kind in kinds:
        one = run_on_one(kind)
        many, compiled = run(kind, placed)
        distance = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), many, one)
        moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one["params"], initial_params())
        rows[kind] = {
            "distance": distance,
            "moved": max(moved.values()),
            "weight": float(np.max(one["weights"])),
            "specs": {name: list(leaf.sharding.spec) for name, leaf in many["params"].items()},
            "collectives": collectives(compiled),
        }
    return rows


if __name__ == "__main__":
    print(json.dumps({name: on_mesh(*mesh) for name, mesh in json.loads(sys.argv[1]).items()}))
