"""A benchmark on Dask workers, some of which are killed, compared with the same benchmark on this machine."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from eupmu_jax.benchmark import cluster, rows
from eupmu_jax.commands import cli

CHOSEN = ["--design", "digits", "--forget", "class:{}", "--methods", "fine-tuning", "weighted sum", "--seeds", "0"]
# Fields in which two runs of the same row may differ.
OF_THE_RUN = {"seconds", "processor_seconds", "compile_seconds", "share_of_retraining", "command"}
SECONDS = 300


def benchmark(out, *more):
    program = "from eupmu_jax.commands.cli import main; main()"
    return [sys.executable, "-c", program, "benchmark", "classification", *CHOSEN, "--out", str(out), *more]


def environment(home, **more):
    return os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(home), "COLUMNS": "200"} | more


def made(out):
    found = rows.read(out / "rows.jsonl")
    names = ("kind", "forget", "model", "method", "trial", "seed")
    keys = [tuple(row.get(name) for name in names) for row in found]
    assert len(keys) == len(set(keys)), "a row was written twice"
    return {key: {f: v for f, v in row.items() if f not in OF_THE_RUN} for key, row in zip(keys, found, strict=True)}


@contextlib.contextmanager
def scheduler(folder, **config):
    """Starts a scheduler on a free port; gives its process and address."""
    folder.mkdir()
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    command += ["--no-dashboard"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, cwd=folder, env=environment(folder, **config))
    try:
        yield process, wait_for(lambda: re.search(r"tcp://127\.0\.0\.1:\d+", (folder / "log").read_text()))[0]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def worker(address, folder, *options, core=0):
    """Starts a worker in its own folder on one core, like the processes of a local run."""
    folder.mkdir()
    cores = sorted(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{cores[core % len(cores)]}}}); from distributed.cli import dask_worker"
    )
    command = [sys.executable, "-c", f"{program}; dask_worker.main()", address, "--nthreads", "1", "--no-dashboard"]
    command += ["--name", folder.name, *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, cwd=folder, env=environment(folder))
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
    return found


def address_of(client, name):
    """The address of the worker of that name, or None while there is none."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return next((address for address, one in workers.items() if one["name"] == name), None)


def busy(client, name):
    """Whether the worker of that name is computing a row."""
    return client.processing().get(address_of(client, name))


def kill(client, name):
    """Kills the process of the worker of that name and returns its address, which no later worker has."""
    address = address_of(client, name)
    os.kill(client.run(os.getpid, workers=[address])[address], signal.SIGKILL)
    return address


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    command = benchmark(out, "--workers", "2")
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(out.parent))
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.mark.long
def test_rows_are_those_of_a_local_run_even_if_two_workers_are_killed(local, tmp_path):
    from distributed import Client

    with (
        scheduler(tmp_path / "scheduler") as (_, address),
        worker(address, tmp_path / "alone", "--no-nanny"),
        worker(address, tmp_path / "nursed", "--nanny", "--nthreads", "2", core=1),
        Client(address) as client,
    ):
        client.wait_for_workers(2, timeout=SECONDS)
        # Use a relative folder, since workers run elsewhere.
        driver = subprocess.Popen(
            benchmark("out", "--cluster", address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(tmp_path),
        )
        try:
            wait_for(lambda: busy(client, "nursed"))
            first = kill(client, "nursed")
            wait_for(lambda: address_of(client, "nursed") not in (None, first))
            wait_for(lambda: rows.select(rows.read(tmp_path / "out" / "rows.jsonl"), kind="trial"))
            wait_for(lambda: busy(client, "alone"))
            kill(client, "alone")
            _, said = driver.communicate(timeout=SECONDS)
        finally:
            driver.kill()
            driver.communicate()
    assert driver.returncode == 0, said
    assert made(tmp_path / "out") == made(local)
    for name in ("alone", "nursed"):
        assert not list((tmp_path / name).glob("**/*.jsonl"))
        assert not (tmp_path / name / "out").exists()


def given_up(driver):
    _, said = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 1
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.long
def test_a_row_that_kills_its_workers_and_a_lost_scheduler_are_reported_in_one_line(tmp_path):
    from distributed import Client

    run = lambda: subprocess.Popen(
        benchmark(tmp_path / "out", "--cluster", address),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    with (
        scheduler(tmp_path / "scheduler", DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as (process, address),
        worker(address, tmp_path / "nursed", "--nanny"),
    ):
        with Client(address) as client:
            first = run()
            wait_for(lambda: busy(client, "nursed"))
            killed = kill(client, "nursed")
            assert given_up(first).startswith("eupmu: a row was given up")
            wait_for(lambda: address_of(client, "nursed") not in (None, killed))
            second = run()
            wait_for(lambda: busy(client, "nursed"))
        process.kill()
        assert given_up(second).startswith(f"eupmu: the scheduler at {address} went away")


@pytest.mark.slow
def test_a_worker_of_another_version_is_refused(tmp_path):
    (tmp_path / "older.py").write_text(
        "from eupmu_jax.benchmark.designs import DESIGNS\nDESIGNS['digits'] = DESIGNS['digits']._replace(version=0)\n"
    )
    with (
        scheduler(tmp_path / "scheduler") as (_, address),
        worker(address, tmp_path / "old", "--preload", str(tmp_path / "older.py")),
    ):
        command = benchmark(tmp_path / "out", "--cluster", address)
        finished = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=SECONDS)
    assert finished.returncode == cli.BAD_INPUT
    assert "every machine needs the same version of eupmu-jax" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def fails(arguments, capsys, eupmu):
    """Runs the command on bad input and returns its line on stderr."""
    assert eupmu("benchmark", "classification", *CHOSEN, *arguments) == cli.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp://127.0.0.1:9", "Timed out trying to connect"),
        ("somewhere", "missing port number"),
        ("letters://127.0.0.1:9", "unknown address scheme 'letters'"),
    ],
)
def test_the_address_is_named_if_no_scheduler_answers(address, reason, tmp_path, capsys, monkeypatch, eupmu):
    assert cluster.ANSWER_SECONDS <= 10
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1)
    line = fails(["--out", str(tmp_path), "--cluster", address], capsys, eupmu)
    assert line.startswith(f"eupmu: cluster: got '{address}', expected the address of a scheduler, such as tcp://host")
    assert reason in line
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.slow
def test_without_distributed_the_extra_is_named(tmp_path):
    (tmp_path / "distributed.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'distributed'\", name='distributed')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        benchmark(tmp_path / "out", "--cluster", "tcp://127.0.0.1:9"),
        capture_output=True,
        text=True,
        env=environment(tmp_path, PYTHONPATH=path),
    )
    assert finished.returncode == cli.BAD_INPUT
    assert finished.stderr == (
        "eupmu: cluster: distributed is not installed; it comes with: pip install 'eupmu-jax[cluster]'\n"
    )
