"""`eupmu benchmark classification` on the real digits: its rows, the effect of kills, and messages for bad input."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from eupmu_jax import data, metrics
from eupmu_jax.benchmark import designs, jobs, protocol, rows, runner
from eupmu_jax.commands import cli
from eupmu_jax.training import _alone

CHOSEN = ["--design", "digits", "--forget", "class:{}", "--methods", "EUPMU budget", "--seeds", "0"]
# Fields in which two runs of the same row may differ.
OF_THE_RUN = {"seconds", "processor_seconds", "compile_seconds", "share_of_retraining", "command"}


def command(out, *more):
    program = "from eupmu_jax.commands.cli import main; main()"
    return [sys.executable, "-c", program, "benchmark", "classification", *CHOSEN, "--out", str(out), *more]


def environment(home):
    return os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(home), "COLUMNS": "120"}


def made(out):
    found = rows.read(out / "rows.jsonl")
    names = ("kind", "forget", "model", "method", "trial", "seed")
    keys = [tuple(row.get(name) for name in names) for row in found]
    assert len(keys) == len(set(keys)), "a finished row was made again"
    return {key: {f: v for f, v in row.items() if f not in OF_THE_RUN} for key, row in zip(keys, found, strict=True)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "out"
    finished = subprocess.run(command(out), capture_output=True, text=True, env=environment(out.parent))
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.mark.slow
def test_all_rows_are_written_with_what_is_needed_to_reproduce_them(whole):
    out, printed = whole
    design = designs.design("digits")
    found = rows.read(out / "rows.jsonl")
    kinds = [row["kind"] for row in found]
    assert kinds.count("model") == 4
    assert kinds.count("trial") == design.trials
    assert 1 <= kinds.count("run") <= len(design.scores)
    for row in found:
        assert {"design", "design_version", "forget", "seed", "versions", "device", "cores", "command"} <= set(row)
        assert ("method_version" in row) == (row["kind"] != "model")
        assert row["command"].startswith("eupmu benchmark")
    (retrained,) = [row for row in found if row.get("model") == "retrained" and row["seed"] == 0]
    for row in found:
        if row["kind"] == "run":
            assert row["gap"] == pytest.approx(metrics.average_gap(row, retrained))
            assert set(row["mia"]) == set(metrics.FEATURES)
            assert row["passes_of_retraining"] < 5
            assert set(row["relearning"]) == {"forget_side", "retain_only"}
            assert row["split"] == retrained["split"]
    assert sorted(path.suffix for path in (out / "splits").iterdir()) == [".json"] * 2
    assert "no rows" not in printed


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.long
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_a_benchmark_that_is_killed_twice_and_resumed_gives_the_same_rows(whole, tmp_path):
    out, draw = tmp_path / "out", random.Random(0)
    # First kill only one of its processes, which gives a one-line error and loses nothing.
    run = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True, env=environment(tmp_path))
    while not rows.read(out / "rows.jsonl"):
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert said.splitlines()[-1].startswith("eupmu: a process of the benchmark was killed")
    assert "Traceback" not in said
    assert made(out).items() <= made(whole[0]).items()
    run = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, env=environment(tmp_path))
    time.sleep(draw.uniform(4, 15))
    run.send_signal(signal.SIGKILL)
    run.wait()
    # Rows alone are enough to resume from.
    shutil.rmtree(out / "cache", ignore_errors=True)
    before = (out / "rows.jsonl").read_text()
    finished = subprocess.run(command(out), capture_output=True, text=True, env=environment(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert made(out) == made(whole[0])
    assert (out / "rows.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])


@pytest.mark.slow
def test_a_worker_whose_parent_was_killed_before_it_started_exits(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, nobody = context.Queue(), -1
    process = context.Process(target=runner._start, args=(queue, tmp_path, nobody))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 1


@pytest.mark.slow
def test_compiled_programs_of_a_finished_job_are_released(monkeypatch):
    double = jax.jit(lambda x: 2 * x)
    monkeypatch.setattr(jobs, "run", lambda job, place: double(1.0))
    runner._run(jobs.Job("digits", (), (0,), "fine-tuning"), None)
    assert double._cache_size() == 0


@pytest.mark.slow
def test_nothing_is_computed_twice_and_the_table_needs_no_data(whole, monkeypatch, capsys, eupmu):
    out, _ = whole
    before = (out / "rows.jsonl").read_bytes()
    subprocess.run(command(out), check=True, capture_output=True, env=environment(out.parent))
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("read data"))
    assert eupmu(*command(out, "--no-run")[3:]) == 0
    assert (out / "rows.jsonl").read_bytes() == before
    assert "EUPMU budget" in capsys.readouterr().out


@pytest.mark.slow
def test_a_split_of_other_data_stops_the_run(whole, tmp_path):
    out, _ = whole
    (tmp_path / "splits").mkdir()
    for path in (out / "splits").iterdir():
        record = json.loads(path.read_text())
        (tmp_path / "splits" / path.name).write_text(json.dumps(record | {"data_digest": "0" * 64}))
    design = designs.design("digits")
    (case,) = (case for case in design.cases if case.forget == "class:{}")
    with pytest.raises(ValueError, match="0000000"):
        protocol.keep_split(design, case, 0, tmp_path / "splits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--design", "mnist"], "design: got 'mnist', expected one of fashion_mnist-cnn, "),
        (["--methods", "oblivion"], "method: got 'oblivion', expected one of EUPMU, fine-tuning, gradient ascent, "),
        (["--forget", "random:20%"], "forget: got 'random:20%', expected one of random:10%, random:50%, class:{}"),
        (["--no-run", "--forget", "random:20%"], "forget: got 'random:20%', expected one of random:10%, "),
        (["--seeds", "100"], "seeds: got 100, on which the methods are tuned"),
        (["--seeds", "-1"], "seeds: got -1, expected numbers from 0 to 2147483647"),
        (["--out", __file__], f"out: cannot write to {__file__} (File exists); expected a writable folder"),
        (["--design", "emoji-resnet", "--seeds", "9"], "seeds: got 9, which forgets class:9, expected seeds that"),
    ],
)
def test_bad_input_gets_one_line_before_any_work(arguments, message, tmp_path, eupmu, capsys):
    assert eupmu("benchmark", "classification", "--out", tmp_path / "out", *arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_rows_stops_the_run(tmp_path, eupmu, capsys):
    rows.append(tmp_path / "rows.jsonl", {"method": "original", "data": "digits"})
    assert eupmu("benchmark", "classification", *CHOSEN, "--out", tmp_path) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "rows.jsonl, line 1: got a row without kind, design" in error
    assert error.count("\n") == 1


def test_two_benchmarks_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_alone, "ALONE_SECONDS", 0.01)
    second = _alone.alone(tmp_path)
    with _alone.alone(tmp_path), pytest.raises(ValueError, match="another run is using"), second:
        pass


def test_methods_are_listed_with_source_and_cost(monkeypatch, capsys, eupmu):
    from eupmu_jax.methods import METHODS

    monkeypatch.setenv("COLUMNS", "200")
    assert eupmu("methods") == 0
    printed = capsys.readouterr().out
    for name in METHODS:
        assert name in printed
    assert "held-out" in printed
    assert "2510.22124" in printed


def test_a_negative_number_of_workers_is_refused_before_any_work(tmp_path):
    with pytest.raises(
        ValueError, match=r"^workers: got -1, expected a number of processes, or 0 for one on each core"
    ):
        runner.run("digits", [], [], [], tmp_path / "new", "a command", None, workers=-1)
    assert not (tmp_path / "new").exists()
