import copy
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "experiments" / "cloud"
PREEMPTED = 75


def environment(devices):
    forced = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def manifest():
    return yaml.safe_load((CLOUD / "jobset.yaml").read_text())


def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(manifest):
    (found,) = job(manifest)["template"]["spec"]["containers"]
    return found


def accepted(manifest):
    """Whether the schema has every field with a value of its type; the models drop fields that they do not know."""
    try:
        return JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict() == manifest
    except ValueError:
        return False


def instructions(name):
    lines = (line.split(maxsplit=1) for line in (CLOUD / "Dockerfile").read_text().splitlines() if line)
    return [rest for keyword, rest in lines if keyword == name]


def test_the_manifest_fits_the_schema(manifest):
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    assert accepted(manifest)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: m["spec"].update(failurePolcy={}),
        lambda m: m["spec"]["failurePolicy"].pop("rules") and m["spec"]["failurePolicy"].update(rules=[{"name": "x"}]),
        lambda m: job(m).update(parallelism="four"),
        lambda m: job(m)["template"]["spec"].update(gracePeriod=60),
        lambda m: container(m).update(arguments=[]),
        lambda m: container(m).pop("name"),
    ],
)
def test_a_broken_manifest_does_not_fit_the_schema(manifest, break_it):
    break_it(manifest)
    assert not accepted(manifest)


def test_the_manifest_requests_a_whole_slice(manifest):
    pods, one = job(manifest), container(manifest)
    chips = math.prod(
        map(int, pods["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    )
    assert pods["parallelism"] == pods["completions"]
    assert pods["parallelism"] * one["resources"]["limits"]["google.com/tpu"] == chips
    assert one["resources"]["requests"] == one["resources"]["limits"]
    assert f"--data-axis={chips}" in one["args"]


def test_a_preempted_pod_restarts_the_job_set(manifest):
    first, second = job(manifest)["podFailurePolicy"]["rules"]
    assert first["action"] == second["action"] == "FailJob"
    assert first["onExitCodes"] == {
        "containerName": container(manifest)["name"],
        "operator": "In",
        "values": [PREEMPTED],
    }
    # Kubernetes accepts a pod failure policy only with this restart policy.
    assert job(manifest)["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])


def test_the_container_runs_what_the_manifest_says(manifest, tmp_path):
    """A dry run of the image's entry point with the arguments of the manifest, on the files copied into the image."""
    for sources in instructions("COPY"):
        *names, target = sources.split()
        for name in names:
            to = tmp_path / target / Path(name).name if target.endswith("/") else tmp_path / target
            to.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, to)
    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    assert entry[0] == "python"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        here = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "1", "--process", "0"]
    finished = subprocess.run(
        [sys.executable, *entry[1:], *container(manifest)["args"], *here, "--dry-run"],
        cwd=tmp_path,
        env=environment(16) | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    printed = json.loads(finished.stdout[finished.stdout.index("{\n") :])
    assert printed["mesh"] == {"objective": 1, "data": 16, "model": 1}
    assert printed["processes"] == 1
    assert printed["params"]["['layers'][1]['kernel']"][0] == [256, 256]
    # Parameters and Adam's two moments in float32: at least three copies of 64*256 + 256*256 + 256*10 weights.
    assert printed["bytes_per_device"]["of these donated"] > 3 * 4 * 84_000
    assert printed["bytes_per_device"]["temporary"] > 0


@pytest.mark.tpu
@pytest.mark.parametrize("method", ["explicit", "implicit"])
def test_the_step_compiles_for_the_slice(manifest, method):
    """Uses XLA's TPU compiler if it is installed; no TPU is needed."""
    pytest.importorskip("libtpu")
    topology = job(manifest)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    command = [sys.executable, CLOUD / "unlearn.py", "--dry-run", f"--topology=v5e:{topology}", f"--method={method}"]
    finished = subprocess.run(
        [*command, "--model-axis=4"],
        env=environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    printed = json.loads(finished.stdout)
    assert (printed["device"], printed["processes"]) == ("TPU v5 lite", job(manifest)["parallelism"])
    assert printed["mesh"] == {"objective": 1, "data": 4, "model": 4}
    assert printed["bytes_per_device"]["arguments"] > 0


def test_sigterm_prints_the_command_that_resumes(tmp_path):
    command = [sys.executable, str(CLOUD / "unlearn.py"), "--train-steps=20", "--steps=400", "--method=explicit"]
    command += [
        f"--directory={tmp_path / 'run'}",
        "--log-every=1",
        "--model-axis=2",
        "--save-every=1000",
        "--hidden=32",
    ]
    rows = tmp_path / "run" / "unlearn.jsonl"
    with subprocess.Popen(command, env=environment(2), stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    assert process.returncode == PREEMPTED
    stopped, resume = output.splitlines()
    made = int(stopped.split("before step ")[1].split()[0]) - 20
    assert 2 < made < 400
    python, *arguments = shlex.split(resume)
    assert python == "python"
    resumed = [sys.executable, *arguments, "--log-every=50"]
    finished = subprocess.run(resumed, env=environment(4), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    steps = [json.loads(line)["step"] - 20 for line in rows.read_text().splitlines()]
    assert steps[:made] == list(range(1, made + 1))
    assert steps[made:] == [step for step in range(made + 1, 401) if (step + 20) % 50 == 0 or step == 400]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result) >= {"UA", "RA", "TA", "MIA"}


def test_rows_continue_after_a_line_that_a_kill_truncated(tmp_path):
    # BUG: after a truncated line, the same command could not resume.
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    program = (
        "import unlearn, numpy, pathlib, sys; unlearn.recorder(pathlib.Path(sys.argv[1]))(3, {'loss': numpy.ones(())})"
    )
    subprocess.run(
        [sys.executable, "-c", program, path], check=True, env=environment(1) | {"PYTHONPATH": f"{CLOUD}:{ROOT}"}
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 3, "loss": 1.0},
    ]
