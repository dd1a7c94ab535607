"""The files that a user copies work from request to audit: with one request, with three, and on a mesh."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eupmu_jax.benchmark import rows
from eupmu_jax.service import user_file
from experiments.own_model import journey, page

FILES = Path(journey.__file__).parent
MANY = Path(__file__).parents[1] / "many_commands.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a copy of the plain-JAX file."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FILES / "digits.py", tmp_path)
    return tmp_path


def record(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_files_to_copy_are_short():
    assert len((FILES / "digits.py").read_text().splitlines()) < 80
    others = ("fashion_mnist", "decoder", "denoiser")
    assert all(len((FILES / f"{name}.py").read_text().splitlines()) < 90 for name in others)


def test_what_the_page_says_of_the_first_request_is_in_the_rows():
    first, second, third = rows.read(page.ROWS)
    after = [run["errors"]["forgotten"] for run in (first["unlearned"], second["earlier"][0], third["earlier"][0])]
    assert after[0]["error"] > after[1]["error"] > after[2]["error"]
    # Its interval excludes the target by less than a tenth of a point, and overlaps the target's own.
    target, (low, _) = first["level"]["target"], first["level"]["interval"]
    assert max(target - 0.001, low) < after[2]["high"] < target
    assert all(row["original"]["beside"]["low"] > 0.5 for row in (first, second))
    assert all(row["original"]["attacks"]["forgotten"]["low"] < 0.5 for row in (first, second))


@pytest.mark.slow
def test_three_successive_requests_all_pass_the_audit_after_the_last(here, monkeypatch, eupmu):
    monkeypatch.setattr(journey, "eupmu", eupmu)
    found = journey.run(here / "journey", Path("digits.py"))
    assert [row["codes"] for row in found] == [[0] * 6] * 3
    assert [row["verdict"] for row in found] == ["passed"] * 3
    assert [len(row["earlier"]) for row in found] == [0, 1, 2]
    assert found[-1]["level"]["target"] == 1
    again = [audited["errors"]["forgotten"]["high"] for audited in found[-1]["earlier"]]
    assert all(high >= row["level"]["target"] for high, row in zip(again, found, strict=False))


@pytest.mark.long
def test_a_diffusion_model_forgets_a_digit(here, eupmu):
    # Without `original` its targets moved with it, and the run stopped short of its target.
    shutil.copy(FILES / "denoiser.py", here)
    labels = np.array(user_file.load(here / "denoiser.py", ("data",))["data"]["labels"])
    np.savetxt("ids.txt", np.flatnonzero(labels == 3), "%d")
    assert eupmu("unlearn", "denoiser.py", "--forget", "ids.txt", "--out", "run") == 0
    reached = record(here / "run", "reached")["level"]
    assert reached["source"] == "unknown"
    assert eupmu("audit", "run", "denoiser.py") == 0


@pytest.mark.long
def test_on_a_mesh_of_eight_devices_the_figures_are_the_same(here, on_devices, eupmu):
    np.savetxt("ids.txt", np.arange(100), "%d")
    asked = "--forget ids.txt --steps 60 --forget-batch 16 --retain-batch 48 --retrain --out"
    assert eupmu("unlearn", "digits.py", *asked.split(), "alone") == eupmu("audit", "alone", "digits.py") == 0
    mesh = "\nmesh = eupmu.sharding.make_mesh(data=4, model=2) if len(jax.devices()) == 8 else None\n"
    (here / "meshed.py").write_text((here / "digits.py").read_text() + mesh)
    commands = [
        f"unlearn meshed.py {asked} run",
        "audit run meshed.py",
        "report run",
        "verify run/report.json meshed.py",
    ]
    finished = subprocess.run([sys.executable, str(MANY), *commands], capture_output=True, text=True, env=on_devices(8))
    assert finished.returncode == 0, finished.stderr[-2000:]
    one, eight = (record(here / name, "reached")["figures"]["returned"] for name in ("alone", "run"))
    assert eight == pytest.approx(one, rel=1e-3, abs=1e-4)
    one, eight = (record(here / name, "audit") for name in ("alone", "run"))
    assert one["verdict"] == eight["verdict"] == "passed"
    for model in ("unlearned", "retrained"):
        assert one[model]["errors"] == eight[model]["errors"]
    # A single device verifies the result of eight.
    assert eupmu("verify", "run/report.json", "meshed.py") == 0
    # The other file has the same data and parameters, but is not the one that was run.
    assert eupmu("verify", "run/report.json", "digits.py") == 4
