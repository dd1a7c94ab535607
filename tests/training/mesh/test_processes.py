"""Several processes on this machine, connected over loopback with gloo, against one.

With two devices, two processes equal one bit for bit, since a sum of two numbers has only one order. With four devices,
one process adds in another order than gloo's ring: one and four processes agree to rounding, two and four bit for bit.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from eupmu_jax import data

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import jax

count, index, port, devices, interrupt, method, out = *map(int, sys.argv[1:6]), sys.argv[6], Path(sys.argv[7])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)

import jax.numpy as jnp, numpy as np, optax
import eupmu_jax as eupmu
from eupmu_jax import sharding
from eupmu_jax.training.mesh import feed
from eupmu_jax.objectives import cross_entropy, random_labels
from eupmu_jax.training import loop
from eupmu_jax.training.mesh import placement

assert (jax.process_count(), jax.device_count()) == (count, devices)
digits = dict(np.load(sys.argv[8]))
params = {name: digits.pop(name) for name in ("hidden", "head")}
sets = [digits.pop(name) for name in ("forget", "retain")]
logits = lambda params, batch: jnp.tanh(batch["images"] @ params["hidden"]) @ params["head"]
losses = [
    lambda params, batch, key: cross_entropy(logits(params, batch), random_labels(key, batch["labels"], 10)),
    lambda params, batch, key: cross_entropy(logits(params, batch), batch["labels"]),
]
limit = eupmu.tolerances.budget(1.0, 1.0)
if method == "explicit":
    optimizer = optax.chain(eupmu.unilateral_surgery(limit), optax.sgd(0.1))
    surgery = eupmu.explicit_step(losses, optimizer)
else:
    controller = eupmu.controllers.nu_pi(2.0, 1.0)
    surgery = eupmu.implicit_surgery(limit, controller, proxy="level")
    optimizer = optax.chain(optax.adam(0.01), surgery)
    surgery = eupmu.implicit_step(losses, optimizer)

def step(params, state, batches, key):
    params, state, values = surgery(params, state, batches, key)
    return params, state, {"losses": values, "multipliers": eupmu.multipliers(state)}

read_rows = []
def read(ids):
    read_rows.append(len(ids))
    return {name: array[ids] for name, array in digits.items()}

# With two devices for each process, its rows do not lie side by side, as on a TPU slice.
mesh = sharding.make_mesh(devices, devices=jax.devices()[::2] + jax.devices()[1::2])
batches = feed.batches(read, sets, [16, 48], mesh, seed=0)
carry = placement.place(optimizer, params, jax.random.key(1), mesh)
advance = placement.compile_step(step, carry, next(batches(0)))
rows = []

def log(made, metrics):
    rows.append({"step": made} | {name: value.tolist() for name, value in metrics.items()})
    if interrupt:
        if made == 5 and index == count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # JAX looks for the signal once a second

progress = loop.run(
    advance, carry, batches, directory=out / "checkpoints", meta={"seed": 0}, steps=50, save_every=20, log=log,
    log_every=1,
)
assert set(read_rows) == {16 // count, 48 // count}, read_rows
with (out / f"rows-{index}.jsonl").open("a") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
np.savez(out / f"params-{index}.npz", *map(np.asarray, jax.tree.leaves(progress.carry.params)))
print("made", progress.step, progress.preempted)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits, their split and first parameters, read once for all processes."""
    loaded = data.load("digits")
    split = data.split(loaded.train_labels, "class:3", num_classes=10, seed=0)
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(
        path,
        images=loaded.train_images.reshape(-1, 64),
        labels=loaded.train_labels,
        forget=split.forget_ids,
        retain=split.retain_ids,
        hidden=rng.normal(size=(64, 32)).astype(np.float32) / 8,
        head=rng.normal(size=(32, 10)).astype(np.float32) / 6,
    )
    return path


def run(digits, out, processes, devices, *, method="implicit", interrupt=False):
    """Starts the script in `processes` processes with `devices` devices in total, and returns what each reports."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forced = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices // processes}"
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SCRIPT,
                *map(str, (processes, i, port, devices, int(interrupt), method, out, digits)),
            ],
            env=os.environ | {"XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [output.splitlines()[-1] for output, _ in outputs]


def rows(out, index=0):
    found = [json.loads(line) for line in (out / f"rows-{index}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, 51))
    return {name: np.array([row[name] for row in found]) for name in ("losses", "multipliers")}


def params(out, index=0):
    return list(np.load(out / f"params-{index}.npz").values())


@pytest.fixture(scope="module")
def one(digits, tmp_path_factory):
    """50 steps in one process with two devices."""
    out = tmp_path_factory.mktemp("one")
    assert run(digits, out, 1, 2) == ["made 50 False"]
    return out


def test_two_processes_equal_one(digits, one, tmp_path):
    run(digits, tmp_path, 2, 2)
    for index in (0, 1):
        found, expected = rows(tmp_path, index), rows(one)
        np.testing.assert_array_equal(found["multipliers"], expected["multipliers"])
        np.testing.assert_array_equal(found["losses"], expected["losses"])
        for mine, other in zip(params(tmp_path, index), params(one), strict=True):
            np.testing.assert_array_equal(mine, other)
    assert len(np.unique(expected["multipliers"])) > 40


def test_sigterm_in_one_of_two_then_one_or_four_processes(digits, one, tmp_path):
    """Only the second process gets the signal; both stop at the same step, and other processes resume from there."""
    stopped = tmp_path / "stopped"
    first, second = run(digits, stopped, 2, 2, interrupt=True)
    assert first == second
    _, made, preempted = first.split()
    assert preempted == "True"
    assert 5 < int(made) < 50
    expected = rows(one)
    for processes, devices, tolerance in ((1, 2, 0.0), (4, 4, 1e-5)):
        out = shutil.copytree(stopped, tmp_path / f"resumed-{processes}")
        assert run(digits, out, processes, devices) == ["made 50 False"] * processes
        found = rows(out)
        np.testing.assert_allclose(found["multipliers"], expected["multipliers"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        for mine, other in zip(params(out), params(one), strict=True):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


def test_explicit_surgery_with_two_devices_in_each_of_two_processes(digits, tmp_path):
    run(digits, tmp_path / "one", 1, 4, method="explicit")
    run(digits, tmp_path / "two", 2, 4, method="explicit")
    found, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    np.testing.assert_allclose(found["multipliers"], expected["multipliers"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    assert (expected["multipliers"] > 0).sum() > 10
