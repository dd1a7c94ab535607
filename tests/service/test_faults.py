"""Kills, a full disk, a clock that jumps, examples that are not finite, and nonsense on the command line."""

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from eupmu_jax.service import deletion, ledger, records, user_file

# For a longer run: KILLS=30 pytest -m slow tests/service/test_faults.py
KILLS = int(os.environ.get("KILLS", "1"))
MANY = Path(__file__).parents[1] / "many_commands.py"
UNLEARN = "unlearn mytask.py --request 1 --ledger L/requests.db --out L/run"
NUMBERS = "--steps 300 --forget-batch 16 --retain-batch 48"


def commands(folder):
    steps = ["request add mytask.py ids.txt --ledger L/requests.db", f"{UNLEARN} {NUMBERS}", "audit L/run mytask.py"]
    return [step.replace("L/", f"{folder}/") for step in [*steps, "report L/run"]]


def start(*arguments, limit=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*limit, sys.executable, str(MANY), *arguments], env=environment, **pipes)


def ended(process):
    said = process.communicate()[1]
    return process.returncode, said


@pytest.mark.slow
def test_commands_killed_at_random_moments_end_with_the_same_result_bit_for_bit(file, tmp_path):
    began = time.monotonic()
    assert ended(start(*commands("whole"))) == (0, "")
    whole = time.monotonic() - began
    rng, kills = np.random.default_rng(0), 0
    for _ in range(KILLS):
        process = start(*commands("killed"))
        # Early, as a run that finds its programs compiled is much shorter.
        time.sleep(rng.uniform(0.1, 0.4) * whole)
        process.send_signal(signal.SIGKILL)
        kills += ended(process)[0] == -signal.SIGKILL
    assert kills > 0
    assert ended(start(*commands("killed"))) == (0, "")
    for name in ("reached", "audit"):
        one, other = (records.read(tmp_path / of / "run" / f"{name}.json", name) for of in ("whole", "killed"))
        assert one | {"command": ""} == other | {"command": ""}
    with ledger.opened(tmp_path / "killed" / "requests.db") as connection:
        (request,) = ledger.listed(connection)
        assert (request.examples, request.state) == (30, "unlearned")
        assert len(ledger.ids_of(connection, 1)) == 30
    left = [path.name for path in (tmp_path / "killed" / "run").iterdir() if not path.name.startswith(".")]
    assert set(left) == {"asked.json", "steps", "params", "reached.json", "audit.json", "report.json", "report.html"}


@pytest.mark.slow
def test_a_full_disk_gives_one_line_and_the_same_command_resumes(file, tmp_path):
    # No file may exceed 60 blocks of 512 bytes, which to Orbax looks like a full disk.
    full = "sh", "-c", 'ulimit -f 60; exec "$@"', "sh"
    first, *rest = commands("run")
    assert ended(start(first)) == (0, "")
    code, said = ended(start(*rest, limit=full))
    assert code == 2, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("eupmu: ")
    assert not (tmp_path / "run" / "run" / "reached.json").exists()
    assert ended(start(rest[0])) == (0, "")
    assert (tmp_path / "run" / "run" / "reached.json").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_the_steps_taken_so_far(file, tmp_path):
    # BUG: the run ended at once, and the steps since the last checkpoint were lost.
    command = f"unlearn mytask.py --forget ids.txt --out run {NUMBERS}"
    process = start(command)
    while not (tmp_path / "run" / "steps" / ".lock").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130, said
    assert said.strip().splitlines()[-1].startswith("eupmu: interrupted; finished work is kept")
    (made,) = (int(path.name) for path in (tmp_path / "run" / "steps").iterdir() if path.name.isdigit())
    assert 0 < made < 100
    assert ended(start(command)) == (0, "")


def test_requests_keep_their_order_when_the_clock_is_set_back(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        years = iter((2030, 1999))

        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(next(cls.years), 1, 1, tzinfo=tz)

    monkeypatch.setattr(ledger.datetime, "datetime", Clock)
    with ledger.opened(tmp_path / "requests.db") as connection:
        for number in range(2):
            ledger.add(connection, "0" * 64, np.array([number]), "")
        assert [(r.number, r.made[:4]) for r in ledger.listed(connection)] == [(1, "2030"), (2, "1999")]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("data['inputs'][5] = np.nan", "forget: got 1 of 30 examples .* the first at position 5"),
        ("data['inputs'][50:60] = np.inf", "retain: got 10 of 270 examples .* the first at position 20"),
    ],
)
def test_examples_that_are_not_finite_are_refused_and_leave_no_record_in_the_folder(broken, message, file, tmp_path):
    file.write_text(f"{file.read_text()}data = {{name: array.copy() for name, array in data.items()}}\n{broken}\n")
    own = user_file.load(file, deletion.NEEDED)
    asked = deletion.Asked(steps=20, forget_batch=16, retain_batch=48)
    with pytest.raises(ValueError, match=f"^{message}"):
        deletion.run(own, np.arange(30), tmp_path / "run", asked, "a command")
    assert not list((tmp_path / "run").glob("*.json"))


NONSENSE = st.sampled_from(
    ["absent.py", "folder", "text.txt", "empty.py", "raises.py", "bad.json", "", "-", "mytask.py"]
)
VALUES = st.sampled_from(["-1", "0", "nan", "inf", "1e999", "x", "", "1.5", "9" * 30, "folder", "bad.json", "\u00fc"])
OPTIONS = st.sampled_from(["--forget", "--request", "--out", "--after", "--config", "--limit", "--steps", "--seed"])
COMMANDS = st.sampled_from(
    ["unlearn", "plan", "audit", "report", "verify", "request add", "request show", "request list"]
)


@pytest.fixture(scope="module")
def nonsense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonsense")
    (folder / "folder").mkdir()
    for name, text in {"text.txt": "x\n", "empty.py": "", "raises.py": "1 / 0", "bad.json": '{"version": 2}'}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=COMMANDS,
    files=st.lists(NONSENSE, max_size=2),
    options=st.lists(st.tuples(OPTIONS, VALUES), max_size=3),
)
def test_any_nonsense_on_the_command_line_gives_exit_code_2_and_says_what_is_expected(
    command, files, options, nonsense, monkeypatch, capsys, eupmu
):
    # Without a file, `plan` plans a step for a TPU if libtpu is installed.
    assume(files or command != "plan")
    monkeypatch.chdir(nonsense)
    arguments = [*command.split(), *files, *(word for option in options for word in option)]
    code = eupmu(*arguments)
    said = capsys.readouterr().err
    assert code == 2, arguments
    assert said.strip(), arguments
    # For errors in a user's file, its own lines replace a traceback through the library.
    assert "Traceback" not in said or "the lines of your file" in said
    if said.startswith("eupmu: "):
        assert said.count("\n") == 1
        assert any(word in said for word in ("expected", "is not there", "pip install"))
