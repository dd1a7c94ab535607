"""`eupmu plan` as a user runs it: for eight CPU devices, for TPU slices that are not attached, and with bad input."""

import os
import re
import subprocess
import sys

import jax
import pytest

from eupmu_jax.benchmark import rows as store
from eupmu_jax.commands import plan
from eupmu_jax.training.mesh.program import KINDS

SCRIPT = """
import sys
from eupmu_jax.commands import cli
steps, *arguments = sys.argv[1:]
for step in steps.split(","):
    sys.argv = ["eupmu", "plan", "--step", step, *arguments]
    cli.main()
"""


def run(folder, *steps, **options):
    """The output of `eupmu plan` and its rows by step, from one process that chooses its own platform."""
    out = folder / "new" / "rows.jsonl"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    # Code that is only compiled need not be fast.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(steps), *(f"--{k}={v}" for k, v in options.items()), f"--out={out}"],
        env=environment | {"COLUMNS": "80", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = store.read(out)
    assert [row["step"] for row in rows] == list(steps)
    return finished.stdout, dict(zip(steps, rows, strict=True))


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return run(folder, *plan.STEPS, topology="cpu:8", model="tiny", tensor=2, batch=8, sequence=16)


@pytest.mark.slow
def test_rows_hold_figures_and_their_provenance(on_cpus):
    _, rows = on_cpus
    for step, row in rows.items():
        assert row["parameters"] == 361_088
        assert (row["mesh"], row["batch"], row["sequence"]) == ({"data": 4, "tensor": 2}, [8, 8], 16)
        assert row["bytes"] >= row["argument_bytes"] + row["temporary_bytes"]
        assert min(row["argument_bytes"], row["temporary_bytes"], row["flops"], row["compile_seconds"]) > 0
        assert set(row["collectives"]) == set(KINDS)
        assert {"eupmu-jax", "jax", "jaxlib", "optax", "flax"} <= set(row["versions"])
        assert row["command"].startswith(f"eupmu plan --step {step} --topology=cpu:8")
        assert (row["device"], row["limit_bytes"], row["roofline_seconds"]) == ("cpu", None, None)


@pytest.mark.slow
def test_a_device_holds_its_share_of_parameters_and_moments(on_cpus):
    _, rows = on_cpus
    share = 4 * 361_088 / 8
    copies = {"plain": 3, "explicit": 3, "explicit-bf16": 3, "two-pass": 3, "implicit": 2, "explicit-microbatches": 5}
    for step, count in copies.items():
        # The rest is norms, the batch and the state of the surgery.
        assert count * share < rows[step]["argument_bytes"] < count * share + 12_000, step


@pytest.mark.slow
def test_explicit_surgery_takes_the_flops_of_a_plain_step_and_two_passes_less_than_twice_as_many(on_cpus):
    flops = {step: row["flops"] for step, row in on_cpus[1].items()}
    for step in ("explicit", "explicit-bf16", "explicit-microbatches"):
        assert flops[step] == pytest.approx(flops["plain"], rel=0.05)
    assert 1.1 < flops["implicit"] / flops["plain"] < 1.2  # One more forward pass, over the retain batch.
    assert 1.7 < flops["two-pass"] / flops["plain"] < 2


@pytest.mark.slow
def test_explicit_surgery_adds_one_small_all_reduce(on_cpus):
    _, rows = on_cpus
    for step, row in rows.items():
        assert row["gram_all_reduces"] == int(step.startswith("explicit"))
    for kind in KINDS:
        (plain, _), (explicit, _) = (rows[step]["collectives"][kind] for step in ("plain", "explicit"))
        assert explicit == plain + (kind == "all-reduce")
    for step in rows:
        assert rows[step]["collectives"]["all-gather"][0] > 0


@pytest.mark.slow
def test_the_small_all_reduce_is_found_where_the_compiler_combines_it_with_another(tmp_path):
    # BUG: on a mesh without tensor parallelism it is one with that of the losses, and the table said 0.
    printed, rows = run(tmp_path, "explicit", topology="cpu:2", model="tiny", tensor=1, batch=4, sequence=16)
    assert rows["explicit"]["gram_all_reduces"] == 1
    lines = printed.splitlines()
    index = next(index for index, line in enumerate(lines) if "1 all-reduce of 3 numbers" in line)
    assert lines[index - 1].split()[0] == "all-reduce"


@pytest.mark.slow
def test_tables_fit_a_terminal_and_agree_with_the_rows(on_cpus):
    printed, rows = on_cpus
    assert all(len(line) <= 80 for line in printed.splitlines())
    titles = [line for line in printed.splitlines() if "step, tiny decoder (361,088 parameters) on cpu:8" in line]
    assert [title.split()[0] for title in titles] == list(rows)
    gathers = re.findall(r"all-gather +(\d+) a step", printed)
    assert list(map(int, gathers)) == [row["collectives"]["all-gather"][0] for row in rows.values()]
    assert printed.count("1 all-reduce of 3 numbers") == 3
    assert "at the chip's peaks" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "9b"], "model: got '9b', expected one of tiny, 135m, 1b, 7b, 8b, 70b"),
        (["--model", "ddpm-cifar10", "--adapters", "4"], "adapters: got 4 for ddpm-cifar10, expected 0: only decoders"),
        (["--adapters", "-1"], "adapters: got -1, expected a rank from 0 to"),
        (["--step", "sgd"], "step: got 'sgd', expected one of plain, explicit"),
        (["--topology", "gpu:8"], "topology: got 'gpu:8', expected a slice such as v5e:16x16"),
        (["--topology", "cpu:1000"], "topology: got cpu:1000, but JAX has started with"),
        (["--topology", "v5e:2x2x2"], "topology: got 'v5e:2x2x2', expected 2 axes and at most 256 chips"),
        (["--tensor", "0"], "tensor: got 0, expected a number from 1 to"),
        (["--tensor", "2"], "tensor: got 2, expected at most the 1 devices of cpu:1"),
        (["--data", "-1"], "data: got -1, expected a number from 1 to"),
        (["--data", "3"], "data: got 3, expected at most 1 with tensor 1 on cpu:1"),
        (["--request", "1"], "file: got none with request; expected your Python file, which these need"),
        (
            ["mytask.py", "--batch", "8"],
            "model, batch, out: got together with mytask.py; expected no",
        ),
        (["--epochs", "3", "--forget", "ids.txt"], "file: got none with forget, epochs; expected"),
        (["--batch", "0"], "batch: got 0, expected a number from 1 to"),
        (["--sequence", "-3"], "sequence: got -3, expected a number from 1 to"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, tmp_path, eupmu, capsys):
    jax.devices()  # Before JAX starts, a process may still ask for 1,000 CPU devices.
    given = ["--topology", "cpu:1", "--model", "tiny", "--tensor", "1", "--out", str(tmp_path / "rows.jsonl")]
    assert eupmu("plan", *given, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("eupmu: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("tensor", "data", "batch", "divide"), [(4, 1, 4, "2 key and value heads"), (2, 2, 3, "data to divide the batch")]
)
def test_meshes_must_divide_heads_and_batch(tensor, data, batch, divide, libtpu):
    with pytest.raises(ValueError, match=rf"^tensor, batch: got a mesh of data {data} x tensor {tensor}.*{divide}"):
        plan.make("v5e:2x2", "tiny", "plain", data=data, tensor=tensor, batch=batch, sequence=8)


@pytest.fixture
def libtpu():
    return pytest.importorskip("libtpu")


@pytest.mark.tpu
def test_a_step_is_compiled_for_a_slice_that_is_not_attached(libtpu, tmp_path):
    printed, rows = run(tmp_path, "explicit", topology="v5e:2x2", model="tiny", tensor=2, batch=4, sequence=32)
    row = rows["explicit"]
    assert row["device"] == "TPU v5 lite"
    assert row["limit_bytes"] == 16e9
    assert 0 < row["bytes"] < 16e9
    assert row["gram_all_reduces"] == 1
    times = row["roofline_seconds"]
    assert set(times) == {"compute", "memory", "network"}
    assert min(times.values()) > 0
    assert times["compute"] == pytest.approx(row["flops"] / 197e12)
    assert "of 16 GB" in printed
    assert f"bound by {max(times, key=times.get)}" in " ".join(printed.split())


@pytest.mark.tpu
def test_a_step_that_does_not_fit_says_by_how_much_and_what_to_change(libtpu, tmp_path, eupmu, capsys):
    out = tmp_path / "rows.jsonl"
    options = {"topology": "v5e:2x2", "model": "7b", "tensor": 4, "batch": 1, "sequence": 128, "out": out}
    assert eupmu("plan", *(f"--{name}={value}" for name, value in options.items())) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"eupmu: the step does not fit a device: Ran out of memory on HBM, [^();]*\(\d+\.\d+G\) exceeds available HBM "
        r"\(\d+\.\d+G\); use a larger topology, a larger tensor, a smaller batch or sequence, or the steps two-pass or "
        r"explicit-bf16\n",
        error,
    ), error
    assert not out.exists()
