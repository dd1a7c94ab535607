"""Tables show means, intervals and ties of the rows of the current versions, and of no others."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from eupmu_jax import metrics
from eupmu_jax.benchmark import figures, rows, saved, summary, tables, tuning
from eupmu_jax.benchmark.designs import DESIGNS
from eupmu_jax.methods import METHODS

NAME = "digits"
DESIGN = DESIGNS[NAME]._replace(seeds=(0, 1, 2), trials=2)
CASE = DESIGN.cases[0]


def make():
    """Rows of the two models and of three methods, with given gaps for each seed."""
    common = {"design": NAME, "forget": CASE.forget, **saved.versions(NAME)}
    curve = {"retain_only": {"step": [0, 10], "accuracy": [90.0, 95.0]}}
    figures_ = {"UA": 5.0, "RA": 99.0, "TA": 98.0, "MIA": 8.0, "kl_forget": 0.1, "relearning": curve}
    made = []
    for model, gap in (("original", 3.0), ("retrained", 0.0)):
        made += [{**common, **figures_, "kind": "model", "model": model, "seed": seed, "gap": gap} for seed in range(3)]
    gaps = {"fine-tuning": (2.0, 2.5, 2.2), "SalUn": (1.0, 1.6, 1.1), "EUPMU budget": (1.1, 1.3, 1.2)}
    for method, values in gaps.items():
        common |= saved.versions(NAME, method)
        for trial in range(2):
            score = {"blind": float(trial), "gap": 1.0 - trial}
            common |= {"settings": tuning.settings(METHODS[method], trial)}
            made.append({**common, **score, "kind": "trial", "method": method, "trial": trial, "seed": 100})
            for seed, gap in enumerate(values):
                run = {"kind": "run", "method": method, "trial": trial, "seed": seed, "gap": gap + trial}
                made.append({**common, **figures_, **run, "share_of_retraining": 4.0, "passes_of_retraining": 3.0})
    return made


def of(found, score="blind"):
    return {line.name: line for line in summary.lines_of(found, NAME, DESIGN, CASE, score)}


def test_methods_are_sorted_by_mean_gap_with_intervals_and_ties():
    lines = of(make())
    assert list(lines) == ["original", "retrained", "EUPMU budget", "SalUn", "fine-tuning"]
    best = lines["EUPMU budget"]
    assert best.figures["gap"] == pytest.approx(1.2)
    assert best.gap == metrics.paired_interval([1.1, 1.3, 1.2], np.zeros(3))
    assert [line.name for line in lines.values() if line.tied] == ["EUPMU budget", "SalUn"]
    assert best.trials == [1.0, 0.0]
    assert best.seeds == [0, 1, 2]


def test_seeds_that_are_not_in_the_design_are_shown_with_their_models(tmp_path, monkeypatch):
    monkeypatch.setitem(DESIGNS, NAME, DESIGN)
    for row in make():
        rows.append(tmp_path / "rows.jsonl", row if row["kind"] == "trial" else row | {"seed": row["seed"] + 5})
    # BUG: rows of all seeds went into one table, whose legend gave the number of seeds in the design.
    found = [*make(), *(row for row in rows.read(tmp_path / "rows.jsonl") if row["kind"] != "trial")]
    other = DESIGN._replace(seeds=(5, 6, 7))
    lines = {line.name: line for line in summary.lines_of(found, NAME, other, CASE)}
    assert list(lines) == list(of(found))
    assert all(line.seeds == [5, 6, 7] for line in lines.values())
    assert all(line.seeds == [0, 1, 2] for line in of(found).values())
    assert len(figures.draw(NAME, tmp_path, seeds=(5, 6, 7, 5))) == 3
    assert figures.draw(NAME, tmp_path) == []
    console = Console(file=io.StringIO(), width=200)
    tables.show(NAME, tmp_path, "terminal", console)
    assert (
        f"no rows of {NAME}, seeds 0, 1, 2, in {tmp_path}; there are rows of seeds 5, 6, 7" in console.file.getvalue()
    )
    tables.show(NAME, tmp_path, "terminal", console, seeds=(5, 6))
    assert "Means over 2 seeds" in console.file.getvalue()


def test_the_score_chooses_the_trial():
    blind, informed = of(make()), of(make(), "gap")
    assert informed["SalUn"].figures["gap"] == pytest.approx(blind["SalUn"].figures["gap"] + 1)


def test_a_method_is_shown_once_its_trials_are_complete_and_last_while_seeds_are_missing():
    found = make()
    missing_run = [row for row in found if not (row.get("method") == "SalUn" and row["seed"] == 1)]
    lines = of(missing_run)
    assert list(lines)[-1] == "SalUn"
    assert not lines["SalUn"].tied
    assert tables.cells(lines["SalUn"], 3)[0] == "SalUn (2 of 3 seeds)"
    missing_trial = [row for row in found if not (row["kind"] == "trial" and row["method"] == "SalUn" and row["trial"])]
    assert "SalUn" not in of(missing_trial)


def kept(tmp_path, found):
    """The rows that count among these."""
    rows.replace(tmp_path / "rows.jsonl", found)
    return saved.read(tmp_path / "rows.jsonl")


def test_rows_of_an_earlier_version_of_a_method_do_not_count(tmp_path):
    found = make()
    old = [row | {"method_version": 0} for row in found if row.get("method") == "SalUn"]
    assert kept(tmp_path, [*old, *found]) == found
    others = [row for row in found if row.get("method") != "SalUn"]
    assert kept(tmp_path, [*old, *others]) == others


def test_trials_with_settings_of_another_search_space_do_not_count(tmp_path):
    found = make()
    other = [row | {"settings": row["settings"] | {"learning_rate": 1.0}} for row in found if "trial" in row]
    assert kept(tmp_path, [*other, *found]) == found


def test_rows_of_an_earlier_version_of_a_design_do_not_count(tmp_path, monkeypatch):
    found = make()
    monkeypatch.setitem(DESIGNS, NAME, DESIGN._replace(version=DESIGN.version + 1))
    assert kept(tmp_path, found) == []
    new = [row | saved.versions(NAME) for row in found]
    assert kept(tmp_path, [*found, *new]) == new


def test_rows_of_a_removed_method_or_design_do_not_count(tmp_path):
    found = make()
    gone = [found[-1] | {"method": "oblivion"}, found[0] | {"design": "mnist"}]
    assert kept(tmp_path, [*gone, *found]) == found


def test_a_row_of_another_experiment_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 1: got a row without kind, design, .* expected one with kind"
    ):
        kept(tmp_path, [{"method": "original", "data": "digits", "forget": "class:3", "seed": 0}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"design": ["digits"]}, "got a row with design ['digits'], expected a string"),
        ({"method": None}, "got a row with method None, expected a string"),
        ({"seed": "100"}, "got a row with seed '100', expected an int"),
        ({"trial": 0.5}, "got a row with trial 0.5, expected an int, or 'untuned'"),
        ({"blind": "0.1"}, "got a row with blind '0.1', expected a number"),
        ({"blind": None}, "got a row with blind None, expected a number"),
    ],
)
def test_a_row_with_a_field_of_the_wrong_type_is_named(changed, message, tmp_path):
    # BUG: a traceback, or a trial that was silently missing and computed again.
    found = make()
    trial = next(index for index, row in enumerate(found) if row["kind"] == "trial")
    found[trial] |= changed
    with pytest.raises(ValueError, match=re.escape(f"rows.jsonl: {message}")):
        kept(tmp_path, found)


def test_a_diverged_run_is_last_and_has_no_interval():
    found = make()
    for row in found:
        if row.get("method") == "SalUn" and row["seed"] == 2:
            row["gap"] = None
    lines = of(found)
    assert list(lines)[-1] == "SalUn"
    assert lines["SalUn"].gap is None
    assert not lines["SalUn"].tied
    assert tables.cells(lines["SalUn"], 3)[5:7] == ["-", "-"]


def test_markdown_and_latex_agree_with_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setitem(DESIGNS, NAME, DESIGN)
    for row in make():
        rows.append(tmp_path / "rows.jsonl", row)
    lines = list(of(make()).values())
    cell = tables.cells(lines[2], 3)
    assert cell[0] == "EUPMU budget"
    assert cell[5] == "1.20*"
    assert f"| {' | '.join(cell)} |" in tables.markdown(lines, 3)
    assert tables.latex(lines, 3).count(r"\textbf{1.20}") == 1
    assert r"time, \%" in tables.latex(lines, 3)
    for form in ("terminal", "markdown", "latex"):
        console = Console(width=140, file=io.StringIO())
        tables.show(NAME, tmp_path, form, console)
        printed = console.file.getvalue()
        assert "EUPMU budget" in printed
        assert "chosen blindly" in printed
    written = figures.draw(NAME, tmp_path)
    assert [path.name for path in written] == [f"digits-{kind}.svg" for kind in ("tradeoff", "gaps", "relearning")]
    assert all("<svg" in path.read_text() for path in written)


def test_a_narrow_terminal_shows_fewer_columns_and_truncates_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(DESIGNS, NAME, DESIGN)
    for row in make():
        rows.append(tmp_path / "rows.jsonl", row)
    console = Console(width=80, file=io.StringIO())
    tables.show(NAME, tmp_path, "terminal", console)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert "95 %" not in printed.split("Means over")[0]
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_tables_are_limited_to_the_requested_forget_sets(tmp_path, monkeypatch):
    monkeypatch.setitem(DESIGNS, NAME, DESIGN)
    for row in make():
        rows.append(tmp_path / "rows.jsonl", row)

    def shown(*forget):
        console = Console(width=140, file=io.StringIO())
        tables.show(NAME, tmp_path, "terminal", console, forget)
        return console.file.getvalue()

    assert shown(DESIGN.cases[0].forget, "class:{}") == shown()
    assert "no rows of digits, class:{}, seeds 0, 1, 2, in" in shown("class:{}")


def test_the_untuned_runs_of_a_requested_method_are_shown(tmp_path, monkeypatch):
    # BUG: `--methods EUPMU` computed them, and left them out of its table.
    monkeypatch.setitem(DESIGNS, NAME, DESIGN)
    found = make()
    untuned = [row | {"trial": tuning.UNTUNED} for row in found if row["kind"] == "run" and row["trial"] == 0]
    rows.replace(tmp_path / "rows.jsonl", [*found, *untuned])
    console = Console(width=140, file=io.StringIO())
    tables.show(NAME, tmp_path, "terminal", console, methods=["SalUn"])
    printed = console.file.getvalue()
    assert "SalUn, untuned" in printed
    assert "fine-tuning" not in printed


@pytest.mark.parametrize("scores", [("blind",), ("blind", "gap")])
def test_there_is_a_table_only_for_each_score_of_the_design(tmp_path, monkeypatch, scores):
    monkeypatch.setitem(DESIGNS, NAME, DESIGN._replace(scores=scores))
    for row in make():
        rows.append(tmp_path / "rows.jsonl", row)
    console = Console(width=140, file=io.StringIO())
    tables.show(NAME, tmp_path, "terminal", console)
    printed = console.file.getvalue()
    assert ("retrained model in view" in printed) == ("gap" in scores)
    assert "chosen blindly" in printed


def test_missing_rows_are_reported(tmp_path):
    console = Console(file=io.StringIO())
    tables.show(NAME, tmp_path, "terminal", console)
    assert "no rows of digits" in console.file.getvalue()
    assert figures.draw(NAME, tmp_path) == []


def test_a_duplicate_row_counts_once():
    made = make()
    chosen = [row for row in made if row["kind"] == "run" and row["seed"] == 0]
    assert of([*made, *chosen, *made[:2]]) == of(made)
