"""`eupmu request` and `eupmu unlearn`: the states of requests in the ledger, and what the commands print."""

import json
import sys

import chex
import numpy as np
import pytest

from eupmu_jax.commands import cli, unlearn
from eupmu_jax.service import deletion, ledger, records, user_file
from eupmu_jax.service.attacks import attack
from eupmu_jax.training import checkpoints


def states():
    with ledger.known(cli.LEDGER) as connection:
        return [request.state for request in ledger.listed(connection)]


@pytest.mark.slow
def test_a_level_that_the_limit_does_not_allow_gives_exit_code_3(file, eupmu, capsys):
    # With 150 examples, an error of 0 differs significantly from the error on unseen digits.
    (file.parent / "ids.txt").write_text("\n".join(map(str, range(150))))
    assert eupmu("unlearn", "mytask.py", "--steps", "1", "--out", "run") == 3
    assert "The target was missed within the limit; this is the nearest point found." in capsys.readouterr().out
    assert not json.loads((file.parent / "run" / "reached.json").read_text())["met"]


def test_a_request_is_unlearned_and_its_state_says_so(file, monkeypatch, eupmu, capsys):
    assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    sizes = ["--steps", "60", "--forget-batch", "16", "--retain-batch", "48"]
    assert eupmu("unlearn", "mytask.py", "--request", "1", "--out", "run", *sizes) == 0
    level = json.loads((file.parent / "run" / "reached.json").read_text())["level"]
    # BUG: an error of 3 % was said to have reached a target of 7 %, without the reason.
    reason = ", given its noise," if level["forget_error"] < level["target"] else ""
    assert f"The target was reached{reason} and the limit kept." in capsys.readouterr().out
    assert json.loads((file.parent / "run" / "asked.json").read_text())["positions"] == list(range(30))
    with ledger.known(cli.LEDGER) as connection:
        assert ledger.find(connection, 1).state == "unlearned"
        ledger.set_state(connection, 1, "open")
    # BUG: piped into a program that had ended, the request stayed open.
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "said", lambda *_: sys.exit(1))
        assert eupmu("unlearn", "mytask.py", "--request", "1", "--out", "run", *sizes) == 1
    assert states() == ["unlearned"]
    assert eupmu("unlearn", "mytask.py", "--request", "2", "--out", "other") == 2
    assert "request number: got 2, which the ledger does not have" in capsys.readouterr().err
    # BUG: given with a request, the file of ids was ignored, and request 0 unlearned ids.txt.
    assert eupmu("unlearn", "mytask.py", "--request", "1", "--forget", "ids.txt", "--out", "other") == 2
    assert "forget: got ids.txt and request 1, expected one of them" in capsys.readouterr().err
    assert eupmu("unlearn", "mytask.py", "--request", "0", "--out", "other") == 2
    assert "request: got 0, expected the number of a request in the ledger, 1 or more" in capsys.readouterr().err
    file.write_text(file.read_text() + "data['labels'][0] += 1\n")
    assert eupmu("unlearn", "mytask.py", "--request", "1", "--out", "other") == 2
    assert "request: 1 is for other data than the file's" in capsys.readouterr().err


def test_a_failed_attempt_is_recorded_and_does_not_revert_an_unlearned_request(file, monkeypatch, eupmu):
    made = deletion.run
    monkeypatch.setattr(deletion, "run", lambda *arguments: made(*arguments) | {"met": False})
    sizes = ["--steps", "2", "--forget-batch", "16", "--retain-batch", "48"]
    assert eupmu("request", "add", "mytask.py", "ids.txt") == 0

    def state_after(out):
        assert eupmu("unlearn", "mytask.py", "--request", "1", "--out", out, *sizes) == 3
        with ledger.known(cli.LEDGER) as connection:
            return ledger.find(connection, 1).state

    assert state_after("one") == "infeasible"
    with ledger.opened(cli.LEDGER) as connection:
        ledger.set_state(connection, 1, "unlearned")
    assert state_after("two") == "unlearned"


def test_a_run_overtaken_by_another_request_is_reported_and_not_marked_as_unlearned(file, monkeypatch, capsys, eupmu):
    # BUG: both requests were marked as unlearned, though each model still knew what the other had forgotten.
    for ids in (range(30), range(30, 60)):
        (file.parent / "ids.txt").write_text("\n".join(map(str, ids)))
        assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    made = deletion.run

    def meanwhile(*arguments):
        with ledger.opened(cli.LEDGER) as connection:
            ledger.set_state(connection, 1, "unlearned")
        return made(*arguments) | {"met": True}

    monkeypatch.setattr(deletion, "run", meanwhile)
    sizes = ["--steps", "2", "--forget-batch", "16", "--retain-batch", "48"]
    assert eupmu("unlearn", "mytask.py", "--request", "2", "--out", "two", *sizes) == 2
    printed = capsys.readouterr()
    assert "after: got None, but request 1 on these data is unlearned" in printed.err
    assert "Forgot 30 of 300 examples" in printed.out
    assert states() == ["unlearned", "open"]
    # BUG: repeating the call marked it.
    assert eupmu("unlearn", "mytask.py", "--request", "2", "--out", "two", *sizes) == 2
    assert states() == ["unlearned", "open"]


@pytest.mark.slow
def test_a_run_that_restores_what_an_earlier_run_forgot_is_no_success(file, monkeypatch, capsys, eupmu):
    for ids in (range(30), range(30, 60)):
        (file.parent / "ids.txt").write_text("\n".join(map(str, ids)))
        assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    made = deletion.run
    monkeypatch.setattr(deletion, "run", lambda *arguments: made(*arguments) | {"met": True})
    sizes = ["--steps", "2", "--forget-batch", "16", "--retain-batch", "48"]
    assert eupmu("unlearn", "mytask.py", "--request", "1", "--out", "one", *sizes) == 0
    assert states() == ["unlearned", "open"]
    monkeypatch.setattr(deletion, "run", lambda *arguments: made(*arguments) | {"met": True, "returned": [1]})
    second = ["unlearn", "mytask.py", "--request", "2", "--out", "two", "--after", "one", *sizes]
    assert eupmu(*second) == 3
    assert "What earlier run 1 forgot is known again." in capsys.readouterr().out
    # BUG: the ledger still said that both are unlearned.
    assert states() == ["open", "infeasible"]
    # BUG: repeating the command reverted a request that had been unlearned since.
    with ledger.opened(cli.LEDGER) as connection:
        ledger.set_state(connection, 1, "unlearned")
    assert eupmu(*second) == 3
    assert states() == ["unlearned", "infeasible"]


@pytest.mark.slow
def test_requests_unlearned_on_other_data_are_reported(file, eupmu, capsys):
    # BUG: once an example was added to the data, nothing said that the forgotten examples are retained again.
    assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    with ledger.opened(cli.LEDGER) as connection:
        ledger.set_state(connection, 1, "unlearned")
    file.write_text(file.read_text() + "data['labels'][0] += 1\n")
    assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    capsys.readouterr()
    eupmu("plan", "mytask.py", "--request", "2")
    assert "Requests unlearned on other data than the file has: 1. Positions apply to one" in capsys.readouterr().out
    eupmu("unlearn", "mytask.py", "--request", "2", "--out", "run", "--steps", "2")
    assert "Warning: Requests unlearned on other data than the file has: 1." in capsys.readouterr().out


def test_unseen_examples_with_a_nan_loss_are_refused(file, eupmu, capsys):
    # BUG: their NaN loss caused a TypeError after the run, and hid what an attack found.
    file.write_text(
        file.read_text() + "held_out['inputs'] = held_out['inputs'].copy()\nheld_out['inputs'][3] = np.nan\n"
    )
    assert eupmu("unlearn", "mytask.py", "--out", "run", "--steps", "2") == 2
    assert "examples whose loss under the original model is NaN, the first at position 3" in (capsys.readouterr().err)
    assert attack(np.arange(100.0), np.where(np.arange(100) == 3, np.nan, 60 + np.arange(100))).tells


def test_bad_input_of_the_command_is_one_line(file, eupmu, capsys):
    assert eupmu("unlearn", "mytask.py", "--forget", "absent.txt") == 2
    assert (
        capsys.readouterr().err
        == "eupmu: ids: absent.txt is not there; expected a text file with one position per line\n"
    )


def test_an_error_raised_by_a_function_of_the_users_file_shows_the_lines_of_that_file(file, eupmu, capsys):
    broken = "\ndef outputs(params, batch, key):\n    return batch['no such name']\n\n\n"
    file.write_text(f"{file.read_text()}{broken}task = task._replace(outputs=outputs)\n")
    assert eupmu("unlearn", "mytask.py", "--out", "run") == 2
    said = capsys.readouterr().err
    assert "in outputs" in said
    assert said.strip().endswith("KeyError: 'no such name'")
    assert "eupmu_jax" not in said


@pytest.mark.slow
def test_a_request_does_not_relearn_what_another_had_unlearned(file, eupmu, capsys):
    sizes = ["--steps", "40", "--forget-batch", "16", "--retain-batch", "48"]
    for ids in (range(30), range(30, 60)):
        (file.parent / "ids.txt").write_text("\n".join(map(str, ids)))
        assert eupmu("request", "add", "mytask.py", "ids.txt") == 0
    first = ["unlearn", "mytask.py", "--request", "1", "--out", "one", *sizes]
    second = ["unlearn", "mytask.py", "--request", "2", "--out", "two", *sizes]
    assert eupmu(*first) == 0
    assert eupmu(*second) == 2
    assert "after: got None, but request 1 on these data is unlearned" in capsys.readouterr().err
    assert not (file.parent / "two").exists()
    assert eupmu(*second, "--after", "one") in (0, 3)
    # A finished run is reported again, whatever came after it.
    assert eupmu(*first) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default:out")
def test_a_file_that_changed_since_the_run_is_warned_about(file, eupmu, capsys):
    # BUG: for a changed model the result of the old one was reported, and it was audited without a warning.
    unlearned = ["unlearn", "mytask.py", "--forget", "ids.txt", "--out", "run", "--steps", "2"]
    eupmu(*unlearned)
    assert "earlier version" not in capsys.readouterr().out
    file.write_text(file.read_text() + "# later\n")
    eupmu(*unlearned)
    assert "Warning: out: run holds the finished run of an earlier version of the file" in capsys.readouterr().out
    eupmu("audit", "run", "mytask.py")
    assert "The user's file has changed since the run" in capsys.readouterr().out
    # BUG: the page gave the hash of the file of the run, and did not say that another one was audited.
    eupmu("report", "run")
    assert "file has changed since the run" in (file.parent / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("groups = np.zeros(7)", [], "groups: got shape (7,), expected (300,): one for each example of data"),
        (
            "retrain = lambda: params",
            ["--retrain"],
            "retrain: cannot be called with positions (too many positional arg",
        ),
        (
            "data['inputs'] = data['inputs'].copy(); data['inputs'][5] = np.nan",
            [],
            "forget: got 1 of 30 examples whose",
        ),
        (
            "data['inputs'] = data['inputs'].copy(); data['inputs'][45] = np.nan",
            [],
            "retain: got 1 of 270 examples who",
        ),
        ("frozen = {'hidden': True}", [], "frozen: got no leaf ["),
    ],
)
def test_faults_in_a_users_file_are_reported_before_the_first_step(line, options, message, file, eupmu, capsys):
    # BUG: groups were checked only by the audit, and `retrain` only after all steps. One example that is not finite
    # caused every step to be refused, so that nothing was forgotten.
    file.write_text(f"{file.read_text()}{line}\n")
    assert eupmu("unlearn", "mytask.py", "--out", "run", "--steps", "2", *options) == 2
    assert f"eupmu: {message}" in capsys.readouterr().err
    assert not list((file.parent / "run").glob("steps/*"))


@pytest.mark.slow
def test_parameters_that_a_file_freezes_stay_unchanged(file, eupmu):
    # BUG: `frozen` was not read from the file.
    own = user_file.load(file, deletion.NEEDED)
    name = min(own["params"])
    file.write_text(f"{file.read_text()}frozen = lambda params: {{name: name == {name!r} for name in params}}\n")
    eupmu("unlearn", "mytask.py", "--out", "run", "--steps", "20")
    found, _ = checkpoints.load(file.parent / "run" / "params", own["params"], {})
    for leaf in own["params"]:
        assert np.array_equal(found[leaf], own["params"][leaf]) == (leaf == name)


# A frozen 8-bit base with float32 parameters that are added to it.
QUANTISED = """
import jax
scales = jax.tree.map(lambda leaf: np.float32(np.abs(leaf).max() / 127), params)
codes = jax.tree.map(lambda leaf, scale: np.round(leaf / scale).astype(np.int8), params, scales)
params = {"codes": codes, "scales": scales, "added": jax.tree.map(np.zeros_like, params)}
frozen = lambda params: {name: jax.tree.map(lambda _: name != "added", part) for name, part in params.items()}
merged = lambda params: jax.tree.map(
    lambda codes, scale, added: codes * scale + added, params["codes"], params["scales"], params["added"]
)
outputs = task.outputs
task = task._replace(outputs=lambda params, batch, key: outputs(merged(params), batch, key))
"""


@pytest.mark.slow
def test_a_quantised_base_stays_unchanged_and_is_audited(file, eupmu, capsys):
    # BUG: its integers were refused before the run, and relearning in an audit would have trained the base.
    file.write_text(file.read_text() + QUANTISED)
    own = user_file.load(file, deletion.NEEDED)
    assert eupmu("plan", "mytask.py", "--forget", "ids.txt") == 0
    assert eupmu("unlearn", "mytask.py", "--out", "run") == 0
    found, _ = checkpoints.load(file.parent / "run" / "params", own["params"], {})
    for name in ("codes", "scales"):
        chex.assert_trees_all_equal(found[name], own["params"][name])
    assert eupmu("audit", "run", "mytask.py") == 0
    assert "relearning" in records.read(file.parent / "run" / "audit.json", "audit")["unlearned"]
    assert eupmu("report", "run") == eupmu("verify", "run/report.json", "mytask.py") == 0
