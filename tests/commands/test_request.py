"""`eupmu request` as a user runs it."""

import pytest

from eupmu_jax.commands import own_model
from eupmu_jax.service import ledger


@pytest.fixture
def told(tmp_path, monkeypatch, capsys, eupmu):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "mytask.py").write_text("import numpy as np\ndata = {'x': np.arange(10)}\n")
    (tmp_path / "ids.txt").write_text("1\n2\n")

    def run(*arguments, code=0):
        assert eupmu("request", *arguments) == code
        return capsys.readouterr()

    return run


def test_all_positions_are_shown_when_the_output_is_not_a_terminal(told, tmp_path):
    (tmp_path / "mytask.py").write_text("import numpy as np\ndata = {'x': np.arange(100)}\n")
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(60))))
    told("add", "mytask.py", "ids.txt")
    shown = told("show", "1").out
    assert "more" not in shown
    assert "59" in shown


def test_a_request_is_added_listed_and_shown(told):
    assert "Request 1, 2 examples: added." in told("add", "mytask.py", "ids.txt", "--reason", "a [letter]").out
    again = told("add", "mytask.py", "ids.txt", "--reason", "again").out
    assert "exists already" in again
    assert "its reason stays 'a [letter]'" in again
    listed = told("list").out
    assert "a [letter]" in listed
    assert "open" in listed
    shown = told("show", "1").out
    assert "1, 2" in shown
    assert "a [letter]" in shown


@pytest.mark.parametrize("width", [30, 44, 80])
def test_nothing_is_cut_off_in_a_narrow_terminal(width, told, monkeypatch):
    # BUG: at 44 columns the list had no reasons, and hashes ended in an ellipsis.
    told("add", "mytask.py", "ids.txt", "--reason", "letter")
    monkeypatch.setenv("COLUMNS", str(width))
    listed, shown = told("list").out, told("show", "1").out
    assert "…" not in listed + shown
    assert width < 44 or "letter" in listed
    with ledger.known(own_model.LEDGER) as connection:
        assert ledger.find(connection, 1).digest in "".join(shown.split())


def test_a_reason_cannot_steer_the_terminal(told):
    # BUG: escape sequences in the ledger reached the terminal, which they may clear, rename or retype.
    told("add", "mytask.py", "ids.txt", "--reason", "a\x1b[2J letter\x9b31m\u202e\nof 3 May")
    for shown in (told("list").out, told("show", "1").out):
        assert r"a\x1b[2J letter\x9b31m\u202e" in shown
        assert "of 3 May" in shown
        assert all(character.isprintable() or character == "\n" for character in shown)


def test_a_reason_that_is_not_text_is_named(told, tmp_path):
    # BUG: the error named a codec.
    error = told("add", "mytask.py", "ids.txt", "--reason", "caf\udce9", code=2).err
    assert error == "eupmu: reason: got 'caf\\udce9', expected text in UTF-8\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "eupmu: ledger: eupmu_runs/requests.db is not there; `eupmu request add` creates it"),
        (["show", "1"], "eupmu: ledger: eupmu_runs/requests.db is not there"),
        (["add", "absent.py", "ids.txt"], "eupmu: file: absent.py is not there"),
        (["add", "mytask.py", "absent.txt"], "eupmu: ids: absent.txt is not there"),
        (["add", "mytask.py", "mytask.py"], "eupmu: ids: mytask.py, line 1: got 'import numpy as np'"),
        (["add", "mytask.py", "ids.txt", "--ledger", "mytask.py"], "eupmu: ledger: got mytask.py, which is"),
        (["add", "mytask.py", "ids.txt", "--ledger", "mytask.py/a.db"], "eupmu: mytask.py"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, told, tmp_path):
    error = told(*arguments, code=2).err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (tmp_path / "eupmu_runs" / "requests.db").exists()


def test_an_error_in_the_users_file_shows_the_lines_of_that_file(told, tmp_path):
    (tmp_path / "mytask.py").write_text("data = {}\ndata['x'] / 2\n")
    error = told("add", "mytask.py", "ids.txt", code=2).err
    assert error.splitlines()[0] == "Traceback, the lines of your file:"
    assert error.splitlines()[-1] == "KeyError: 'x'"
    assert "runpy" not in error
