"""The plan of a run: it predicts what the run takes, and changes nothing."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import eupmu_jax as eupmu
from eupmu_jax.methods import METHODS
from eupmu_jax.service import deletion, ledger, plan, user_file
from eupmu_jax.training import levels
from eupmu_jax.training.footprint import footprint

IDS = np.arange(30)
ASKED = deletion.Asked(steps=5, forget_batch=8, retain_batch=24)


def make(file, asked=ASKED, **options):
    return plan.make(user_file.load(file, deletion.NEEDED), IDS, asked, **options)


@pytest.mark.slow
def test_planned_passes_and_examples_are_those_of_the_run(file, tmp_path):
    made = make(file)
    reached = deletion.run(user_file.load(file, deletion.NEEDED), IDS, tmp_path / "run", ASKED, "a command")
    assert {name: made[name] for name in ("forward", "backward")} == reached["passes"]
    assert {name: made["examples"][name] for name in ("forget", "retain")} == reached["examples"]


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_a_smaller_one_is_proposed(file, monkeypatch):
    # Otherwise measuring would take more memory than a step of this small model.
    monkeypatch.setattr(levels, "CHUNK", 50)
    large = ASKED._replace(forget_batch=30, retain_batch=1_000)
    fits = make(file, large)
    assert fits["smaller"] is None
    assert fits["temporary"] > fits["outside"]
    assert "a step takes more" in plan.said(fits)
    device = int((fits["bytes"] - 1) / plan.SHARE)
    tight = make(file, large, device_bytes=device)
    smaller = tight["smaller"]
    assert smaller["forget_batch"] < large.forget_batch
    assert smaller["bytes"] <= plan.SHARE * device < fits["bytes"]
    assert f"--forget-batch {smaller['forget_batch']} --retain-batch" in plan.said(tight)
    assert "even with the smallest batches" in plan.said(make(file, device_bytes=1_000))


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from eupmu_jax import sharding
from eupmu_jax.service import deletion, plan
from eupmu_jax.tasks import classification
from eupmu_jax.training.footprint import footprint

task = classification(lambda params, inputs: jnp.tanh(inputs @ params["a"]) @ params["b"], 10)
params = {"a": np.full((64, 1024), 0.1, np.float32), "b": np.full((1024, 10), 0.1, np.float32)}
data = {"inputs": np.ones((1_000, 64), np.float32), "labels": np.arange(1_000) % 10}
own = {"task": task, "params": params, "data": data, "frozen": {"a": False, "b": True}}
asked = deletion.Asked(steps=1, forget_batch=20, retain_batch=60)
make = lambda mesh, **options: plan.make(own | {"mesh": mesh}, np.arange(100), asked, **options)
one, eight = make(None), make(sharding.make_mesh(4, 2))
# Parameters and moments are split in two, and no device holds the examples of all steps.
assert eight["arguments"] < 0.6 * (one["arguments"] - data["inputs"].nbytes), (one, eight)
assert eight["temporary"] < one["temporary"] and eight["backward"] == one["backward"]
assert "for each device of the mesh (objective 1, data 4, model 2): " in plan.said(eight), plan.said(eight)
tight = make(sharding.make_mesh(4, 2), device_bytes=int(eight["bytes"] / plan.SHARE) - 1)["smaller"]
assert (tight["forget_batch"], tight["retain_batch"]) == (8, 28), tight
# BUG: parameters on a device were an error of JAX beside the mesh, and the teacher was not split like the student.
forget, on_one = {name: array[:100] for name, array in data.items()}, jax.device_put(params, jax.devices()[0])
size = lambda method: footprint(method, task, on_one, forget, data, steps=1, mesh=sharding.make_mesh(1, 2)).arguments
assert 0 < size("SCRUB") - size("l1-sparse") < 0.7 * params["a"].nbytes + params["b"].nbytes
"""


@pytest.mark.slow
def test_the_plan_of_a_file_with_a_mesh_is_that_of_each_device(on_devices):
    finished = subprocess.run([sys.executable, "-c", ON_EIGHT], env=on_devices(8), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.slow
def test_a_file_without_a_mesh_is_planned_for_devices_that_are_named(file, eupmu, capsys):
    assert eupmu("plan", file, "--tensor", "1") == 2
    assert "topology: got none with tensor; expected devices" in capsys.readouterr().err
    assert eupmu("plan", file, "--topology", "cpu:1", "--tensor", "1") == 0
    assert "for each device of the mesh (objective 1, data 1, model 1): " in capsys.readouterr().out


@pytest.mark.tpu
def test_a_file_is_planned_for_a_slice_that_is_not_attached(file, eupmu, capsys):
    pytest.importorskip("libtpu")
    assert eupmu("plan", file, "--topology", "v5e:2x2", "--tensor", "2") == 0
    assert re.search(r"\(objective 1, data 2, model 2\): [\d.]+ MB of 16\.00 GB", capsys.readouterr().out)


@pytest.mark.slow
def test_no_smaller_batch_is_proposed_where_measuring_takes_more_memory_than_a_step(file):
    small = make(file)
    assert small["outside"] > small["temporary"]
    assert small["bytes"] == small["arguments"] + small["outside"]
    assert "measuring takes more" in plan.said(small)
    tight = make(file, device_bytes=small["bytes"])
    assert tight["smaller"] is None
    assert "the batch size does not affect measuring" in plan.said(tight)


@pytest.mark.parametrize(("method", "count"), [("EUPMU", 300), ("EUPMU budget", 200), ("SalUn", 500), ("mean", 0)])
def test_a_footprint_includes_the_largest_pass_outside_of_the_steps(method, count):
    inputs = np.ones((1_200, 4), np.float32)
    data = {"inputs": inputs, "labels": np.zeros(1_200, int)}
    # The logits alone take 500 numbers for each example.
    task = eupmu.tasks.classification(lambda params, inputs: inputs @ params, num_classes=500)
    numbers = {"steps": 2, "forget_batch": 1, "retain_batch": 1, "settings": None}
    found = footprint(method, task, np.zeros((4, 500), np.float32), data, data, **numbers)
    assert found.outside >= count * 500 * 4
    assert (found.outside > 0) == (count > 0)
    assert found.bytes == found.arguments + max(found.temporary, found.outside)


@pytest.mark.slow
def test_a_plan_names_earlier_requests_and_changes_nothing(file, tmp_path, eupmu, capsys):
    data = user_file.data_digest(user_file.load(file, ("data",))["data"])
    with ledger.opened(tmp_path / "requests.db") as connection:
        ledger.add(connection, data, IDS[20:], "")
        ledger.add(connection, data, np.arange(40, 50), "")
        ledger.add(connection, "0" * 64, IDS, "")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    eupmu("plan", "mytask.py", "--ledger", "requests.db", "--epochs", 100)
    said = capsys.readouterr().out
    assert "Request 1 already has 10 of these examples." in said
    assert "Request 2" not in said
    assert "--after" not in said
    assert "% of retraining" in said
    eupmu("plan", "mytask.py", "--ledger", "requests.db", "--request", 1)
    assert "already" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_plan_names_the_run_to_continue_from(file, tmp_path):
    own, requests = user_file.load(file, deletion.NEEDED), tmp_path / "requests.db"
    own["groups"] = np.arange(300) // 15
    with ledger.opened(requests) as connection:
        for ids in (IDS, np.arange(40, 50), np.arange(60, 70)):
            ledger.add(connection, user_file.data_digest(own["data"]), ids, "")
        ledger.set_state(connection, 1, "unlearned")
    said = plan.said(plan.make(own, IDS, ASKED, requests=requests, number=1))
    assert "--after" not in said
    # BUG: nothing said that unseen examples of users that stay make a target that is too low.
    assert "Groups to be forgotten entirely: 2." in said
    made = plan.make(own, np.arange(60, 70), ASKED, requests=requests, number=3)
    assert made["unlearned"] == [1]
    assert "1 (the latest is request 1). `eupmu unlearn --after RUN` continues" in plan.said(made)
    assert "Groups" not in plan.said(made)


@pytest.mark.slow
def test_a_plan_does_not_retain_what_an_earlier_run_forgot(file, tmp_path, caplog):
    # BUG: a run that continues another was planned as if it were the first.
    own = user_file.load(file, deletion.NEEDED) | {"groups": np.arange(300) // 15}
    deletion.run(own, IDS, tmp_path / "run", ASKED._replace(steps=1), "a command")
    assert "Groups to be forgotten entirely: 2." in caplog.text
    rest = np.arange(60, 70)
    made = plan.make(own, rest, ASKED, after=tmp_path / "run")
    assert made["examples"]["retain"] == plan.make(own, rest, ASKED)["examples"]["retain"] - len(IDS)
    with pytest.raises(ValueError, match=r"^ids: got 0, .*, which an earlier run forgot"):
        plan.make(own, IDS, ASKED, after=tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limit": 0.0}, "limit: got 0.0, expected points of accuracy above 0, at most 100"),
        ({"limit": 101}, "limit: got 101, expected points"),
        ({"limit": float("nan")}, "limit: got nan, expected points"),
        ({"seed": -1}, "seed: got -1, expected an int of at least 0"),
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected an int of at most"),
    ],
)
def test_what_no_run_can_begin_with_cannot_be_planned(changed, message, file):
    # BUG: it was planned without a word, and refused by the run.
    with pytest.raises(ValueError, match=f"^{message}"):
        make(file, ASKED._replace(**changed))


def test_what_is_not_a_mesh_cannot_be_planned(file):
    # BUG: an AttributeError.
    with pytest.raises(ValueError, match=r"^mesh: got 3, expected a mesh"):
        plan.make(user_file.load(file, deletion.NEEDED) | {"mesh": 3}, IDS, ASKED)


def test_a_plan_says_what_an_audit_can_compare_with(file):
    assert "compare with held-out data." in plan.said(make(file))
    file.write_text(file.read_text() + "held_out = None\nretrain = print\n")
    assert "compare with a retrained model (--retrain)." in plan.said(make(file))
    file.write_text(file.read_text() + "del retrain\n")
    assert "so it will be inconclusive" in plan.said(make(file))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["EUPMU", "weighted sum", "SalUn"])
def test_a_footprint_counts_the_passes_of_the_method(method, file):
    own = user_file.load(file, deletion.NEEDED)
    forget, retain = ({k: v[ids] for k, v in own["data"].items()} for ids in (IDS, np.arange(30, 300)))
    numbers = {"steps": 2, "forget_batch": 8, "retain_batch": 24}
    found = footprint(method, own["task"], own["params"], forget, retain, **numbers)
    run = eupmu.unlearn(method, own["task"], own["params"], forget, retain, **numbers, probes=0)
    assert (found.forward, found.backward) == (run.forward, run.backward)
    assert method in METHODS
    assert found.bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(own["params"]))


def test_an_empty_ledger_has_no_requests_and_stays_empty(tmp_path):
    path = tmp_path / "empty.db"
    path.touch()
    assert plan._earlier(path, {}, IDS, 0) == ({}, [], [])
    assert not path.read_bytes()
