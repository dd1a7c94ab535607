"""`eupmu demo` on the real digits, as a user runs it, and what it says to bad input."""

import subprocess
import sys

import pytest

from eupmu_jax.benchmark import rows as store
from eupmu_jax.commands import cli, page
from eupmu_jax.commands.demo import METHODS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-c", "from eupmu_jax.commands.cli import main; main()"]
    finished = subprocess.run(
        [*command, "demo", "--forget", "class:3", "--seed", "0", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "80", "JAX_PLATFORMS": "cpu", "HOME": str(out.parent)},
    )
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout, {row["method"]: row for row in store.read(out / "rows.jsonl")}


def test_rows_hold_every_method_and_their_provenance(demo):
    _, _, rows = demo
    assert list(rows) == ["original", "retrained", *METHODS]
    for row in rows.values():
        assert {"UA", "RA", "TA", "MIA", "gap", "rise", "seconds", "seed", "split", "versions", "device"} <= set(row)
        assert row["command"].startswith("eupmu demo")
    assert rows["retrained"]["gap"] == 0
    assert rows["EUPMU implicit"]["forward_passes"] > rows["EUPMU next-batch"]["forward_passes"]


@pytest.mark.parametrize("method", ["EUPMU explicit", "EUPMU implicit"])
def test_the_class_is_forgotten_and_the_rest_is_kept(demo, method):
    _, _, rows = demo
    assert rows[method]["UA"] >= 95
    assert rows[method]["RA"] >= rows["original"]["RA"] - 1.0
    assert rows[method]["gap"] < rows["gradient ascent"]["gap"]


def test_the_table_fits_a_terminal_and_shows_what_the_rows_say(demo):
    _, printed, rows = demo
    lines = printed.splitlines()
    assert all(len(line) <= 80 for line in lines if "report.html" not in line)
    for method, row in rows.items():
        (line,) = [line for line in lines if line.strip().startswith(method)]
        assert line.split()[-len(page.COLUMNS) :] == page.cells(row)


def test_the_page_is_self_contained_and_shows_every_method(demo):
    out, _, rows = demo
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert all(method in page for method in rows)
    assert "src=" not in page
    assert "href=" not in page.replace("xlink:href=", "")


def test_unlearned_models_can_be_restored(demo):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eupmu_jax.benchmark import problems
    from eupmu_jax.training import checkpoints

    out, _, rows = demo
    prepared = problems.make("digits", "class:3", seed=0)
    like = problems.train(
        prepared, np.arange(len(prepared.dataset.train_labels)), init_seed=0, cache=out / "models", on_step=pytest.fail
    ).params
    like = jax.tree.map(jnp.zeros_like, like)
    params, _ = checkpoints.load(out / "checkpoints" / "EUPMU-implicit", like, {"method": "EUPMU implicit"})
    figures = problems.evaluate(prepared, params)
    assert figures["UA"] == pytest.approx(rows["EUPMU implicit"]["UA"])
    assert figures["retain_loss"] == pytest.approx(rows["EUPMU implicit"]["retain_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "name: got 'mnist', want 'digits' or 'fashion_mnist'"),
        (["--forget", "class:11"], "forget: got 'class:11', want a class from 0 to 9"),
        (["--forget", "random:0%"], "forget: got 'random:0%', want a percentage above 0 and below 100"),
        (["--forget", "random:100%"], "forget: got 'random:100%'"),
        (
            ["--forget", "everything"],
            "forget: got 'everything', want 'class:<index>', 'random:<number>%' or 'memorised:<number>%'",
        ),
        (["--out", "FILE/folder"], "out: cannot write to"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eupmu", "demo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("eupmu: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "eupmu_runs" / "demo" / "models").exists()
