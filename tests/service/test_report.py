"""The report: its content, that it is a self-contained page, and that verification finds any change."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.commands import report as page
from eupmu_jax.service import audit, deletion, records, report, retraining, user_file
from eupmu_jax.service._again import absolute, differences

from .conftest import FILE

NASTY = "eupmu unlearn '<script>alert(1)</script>' & \"more\""


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A folder with a user's file and a run that was audited and reported."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(trained, folder)
    (folder / "mytask.py").write_text(FILE.replace('"params.npz"', f"{str(trained)!r}"))
    asked = deletion.Asked(steps=20, forget_batch=16, retain_batch=48)
    own = user_file.load(folder / "mytask.py", deletion.NEEDED)
    deletion.run(own, np.arange(30), folder / "run", asked, NASTY)
    audit.run(folder / "mytask.py", folder / "run")
    page.run(folder / "run")
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def verify(folder):
    return report.verify(folder / "run" / "report.json", folder / "mytask.py")


def test_the_page_is_self_contained_and_escapes_what_a_user_wrote(finished):
    text = (finished / "run" / "report.html").read_text()
    assert "<script" not in text
    assert html.escape(NASTY) in text
    assert "src=" not in text
    assert "href=" not in text.replace("xlink:href=", "")
    # BUG: the page said neither that the check ends with the deletion of the data, nor that other files know them.
    assert "<code>eupmu verify report.json FILE.py</code> repeats the audit. It needs the original parameters" in text
    assert "<code>steps</code> of this folder, may still know the forgotten examples." in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_explains_what_it_shows_and_nothing_else(finished):
    made = json.loads((finished / "run" / "report.json").read_text())
    words = ("AUC: how", "TPR: the", "Relearned: ", "relearning is shown", page.AIMED, page.COMPARED)
    shown = lambda: [word for word in words if word in page.render(made)]
    assert shown() == list(words)
    # BUG: examples held out after the run are compared with all the same, and the page did not say so.
    made["reached"]["level"]["comparison"] = None
    assert shown() == [word for word in words if word != page.AIMED]
    # BUG: lines of attacks and of relearning were explained where there were none.
    for model in page.MODELS[:2]:
        made["audit"][model] = {"errors": made["audit"][model]["errors"]}
    assert shown() == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser, Debian's package chromium")
@pytest.mark.parametrize("width", [400, 1_200])
def test_a_browser_renders_the_page_and_nothing_is_wider_than_the_screen(width, finished, tmp_path):
    page = (finished / "run" / "report.html").read_text()
    (tmp_path / "page.html").write_text(page)
    # Measure in a frame, since a headless browser's window cannot be as narrow as a phone.
    frame = f'<iframe width="{width}" style="border: 0" srcdoc="{html.escape(page)}" onload="measure(this)"></iframe>'
    measure = "document.title = frame.contentDocument.documentElement.scrollWidth"
    (tmp_path / "frame.html").write_text(f"<script>function measure(frame) {{ {measure} }}</script>{frame}")
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
    browser = ["chromium", *options.split(), f"--window-size={width},900"]
    address = [(tmp_path / f"{name}.html").as_uri() for name in ("frame", "page")]
    dumped = subprocess.run([*browser, "--dump-dom", address[0]], capture_output=True, text=True, timeout=120).stdout
    assert f"<title>{width}</title>" in dumped
    subprocess.run([*browser, f"--screenshot={tmp_path / 'page.png'}", address[1]], capture_output=True, timeout=120)
    pixels = np.asarray(PIL.Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (900, width, 3)
    colors = {tuple(color) for color in pixels.reshape(-1, 3)[::7].tolist()}
    # The chart is visible, not just the text.
    assert {(11, 110, 79), (255, 255, 255)} <= colors


def test_figures_on_the_page_agree_with_the_report(finished):
    made = records.read(finished / "run" / "report.json", "report")
    text = (finished / "run" / "report.html").read_text()
    level = made["reached"]["level"]
    assert f"{100 * level['forget_error']:.1f} %; the target is {100 * level['target']:.1f} %" in text
    auc = made["audit"]["unlearned"]["attacks"]["forgotten"]["auc"]
    assert f"<td>{auc:.2f} (" in text
    assert "epsilon at least" in text
    assert made["reached"]["params"] in text
    assert not re.search(r"certified|compliant", text, re.IGNORECASE)


def test_an_unchanged_report_verifies(finished):
    assert verify(finished) == []


def change_report(folder, change):
    path = folder / "run" / "report.json"
    made = json.loads(path.read_text())
    change(made)
    path.write_text(json.dumps(made))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder):
    files = [path for path in (folder / "run" / "params").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: flip(largest_file(f)), "is not the file that was reported"),
        (lambda f: largest_file(f).unlink(), "is not there"),
        (lambda f: (f / "run" / "audit.json").write_text("{}"), "audit.json: is not the file that was reported"),
        (
            lambda f: change_report(f, lambda made: made["audit"].update(verdict="failed")),
            "report.json: audit differs from audit.json",
        ),
        (
            lambda f: change_report(f, lambda made: made["reached"]["level"].update(forget_error=0.5)),
            "report.json: reached differs from reached.json",
        ),
        (lambda f: change_report(f, lambda made: made["files"].clear()), "is not among the files that were reported"),
        (
            lambda f: change_report(f, lambda made: made["files"].update({"../mytask.py": "0" * 64})),
            "../mytask.py: leads out of the folder",
        ),
        (
            lambda f: change_report(f, lambda made: made["files"].update({"/etc/hostname": "0" * 64})),
            "/etc/hostname: leads out of the folder",
        ),
    ],
)
def test_changes_are_named(change, expected, copy):
    change(copy)
    assert any(expected in line for line in verify(copy))


def test_figures_changed_together_with_their_hashes_are_found_by_recomputing_them(copy):
    path = copy / "run" / "audit.json"
    audited = json.loads(path.read_text())
    audited["unlearned"]["errors"]["forgotten"]["error"] += 0.2
    records.write(path, audited)
    report.make(copy / "run")
    (line,) = verify(copy)
    assert line.startswith("audit.unlearned.errors.forgotten.error: reported ")


def test_a_record_of_a_result_that_was_not_reached_fails_audit_and_verification(copy):
    # BUG: the target, the limit and whether they were met were trusted, so a run that forgot nothing passed.
    path = copy / "run" / "reached.json"
    reached = json.loads(path.read_text())
    reached |= {"met": not reached["met"], "least": 0.0}
    reached["level"] |= {"target": 0.01, "interval": [0.0, 0.02], "limit": 0.9}
    reached["examples"]["forget"] += 1
    # BUG: percentages could be shown as if they were losses.
    reached["rates"] = False
    records.write(path, reached)
    before = json.loads((copy / "run" / "audit.json").read_text())
    report.make(copy / "run")
    assert any(line.startswith("audit.reasons: reported ") for line in verify(copy))
    audited = audit.run(copy / "mytask.py", copy / "run")
    assert audited["verdict"] == audit.FAILED
    (said,) = [reason for reason in audited["reasons"] if reason.startswith("reached.json does not match")]
    assert all(name in said for name in ("level.target", "level.limit", "level.interval", "; least: reported"))
    assert "examples: reported" in said
    assert "rates: reported False, found True" in said
    assert not any("reached.json" in reason for reason in before["reasons"])


@pytest.mark.parametrize(
    ("place", "reported", "found", "differs"),
    [
        ("audit.error", 0.5, 0.502, True),
        ("audit.error", 0.5, 0.5004, False),
        ("audit.relearning.on retained.accuracy", [50.0], [56.0], True),
        ("audit.relearning.on retained.accuracy", [50.0], [54.0], False),
        ("audit.canaries", None, {"epsilon": 1.0}, False),
        ("audit.lira", None, {"auc": 0.5}, True),
        ("audit.classes", {"1": 0.5}, {"1": 0.5, "3": 0.9}, True),
        ("audit", {"a": 1.0}, {}, True),
        ("level.comparison.losses_p_value", 1e-4, 5e-4, True),
    ],
)
def test_what_counts_as_a_difference(place, reported, found, differs):
    assert bool(differences(place, reported, found)) is differs


def test_a_file_other_than_that_of_the_run_is_named(copy):
    (copy / "mytask.py").write_text((copy / "mytask.py").read_text() + "# later\n")
    code, remark = verify(copy)
    assert code.startswith("reached.code: ")
    assert remark.startswith("audit.remarks: ")


def test_the_command_names_differences_with_exit_code_4(copy, eupmu, capsys):
    arguments = "verify", copy / "run" / "report.json", copy / "mytask.py"
    assert eupmu(*arguments) == 0
    assert capsys.readouterr().out.startswith("All hashes and all figures of the audit are as reported. ")
    flip(largest_file(copy))
    assert eupmu(*arguments) == 4
    assert "is not the file that was reported" in capsys.readouterr().out


def test_names_in_a_report_cannot_steer_the_terminal(copy, eupmu, capsys):
    # BUG: a report could clear the screen and write that all of it had been verified.
    name = "\x1b[2J\x1b[HAll hashes are as reported.\n"
    change_report(copy, lambda made: made["files"].update({name: "0" * 64}))
    assert eupmu("verify", copy / "run", copy / "mytask.py") == 4
    assert capsys.readouterr().out == "\\x1b[2J\\x1b[HAll hashes are as reported. : is not there\n"


def test_a_run_that_was_not_audited_has_no_report(copy):
    (copy / "run" / "audit.json").unlink()
    with pytest.raises(ValueError, match=r"audit.json is not there; expected the folder of a finished and audited run"):
        report.make(copy / "run")


def test_a_run_that_was_retrained_after_its_audit_has_no_report(copy):
    # BUG: the page showed the verdict of the old audit, and verification called that verdict wrong.
    own, out = user_file.load(copy / "mytask.py", deletion.NEEDED), copy / "run"
    (out / retraining.RETRAINED / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    report.make(out)
    retraining.retrain(own | {"retrain": lambda positions: own["params"]}, out)
    with pytest.raises(ValueError, match=r"^out: .*run was audited before its model was retrained, expected an audit"):
        report.make(out)


def test_a_run_that_was_repeated_after_its_audit_has_no_report(copy):
    # BUG: the page showed the verdict of an audit of other parameters.
    path = copy / "run" / "reached.json"
    records.write(path, records.read(path, "reached") | {"params": "0" * 64})
    with pytest.raises(ValueError, match=r"^out: .*run was audited with other parameters than it has now, expected"):
        report.make(copy / "run")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(found=JSON | st.fixed_dictionaries({"version": st.just(records.VERSION), "asked": JSON, "files": JSON}))
def test_invalid_json_gives_a_value_error_that_names_the_file(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "report.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"report: .*report.json has "):
        records.read(path, "report")


@pytest.mark.parametrize("change", [dict.clear, lambda history: history["step"].pop()])
def test_a_history_that_cannot_be_drawn_is_named(change, copy, eupmu, capsys):
    # BUG: `eupmu report` ended with a traceback, after it had written half of the report.
    path = copy / "run" / "reached.json"
    reached = json.loads(path.read_text())
    change(reached["history"])
    path.write_text(json.dumps(reached))
    assert eupmu("report", copy / "run") == 2
    assert re.match(r"eupmu: out: .*reached.json has a history of \{.*, expected equally", capsys.readouterr().err)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^file: .*absent.py is not there; expected the Python file"):
        report.verify(tmp_path, tmp_path / "absent.py")


def test_a_link_out_of_the_folder_is_not_followed(copy):
    (copy / "run" / "params" / "link").symlink_to(copy / "mytask.py")
    digest = report._sha256(copy / "mytask.py")
    change_report(copy, lambda made: made["files"].update({"params/link": digest}))
    assert "params/link: leads out of the folder" in verify(copy)


def test_other_parameters_in_the_file_are_named(copy):
    text = (copy / "mytask.py").read_text()
    (copy / "mytask.py").write_text(text + "params['out'] = params['out'] + 1\n")
    with pytest.raises(ValueError, match="has other data or parameters than the run"):
        audit.make(copy / "mytask.py", copy / "run")


def test_errors_that_are_not_rates_are_compared_on_their_own_scale():
    level = {"target": 1e-4, "start": 2e-5, "forget_error": 3e-5, "retain_error": None}
    assert absolute(True, level) == 1e-3
    assert absolute(False, level) == pytest.approx(1e-10)
    assert absolute(False, level | {"target": 50.0}) == 1e-6
