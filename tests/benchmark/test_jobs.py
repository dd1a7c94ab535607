"""What a job still lacks, given its existing rows: none, some, all trials, or everything."""

from pathlib import Path

import pytest

from eupmu_jax.benchmark import designs, jobs, rows, runner, saved
from eupmu_jax.methods import METHODS

ROWS = Path(__file__).parents[2] / "experiments" / "classification" / "rows.jsonl"
DESIGN = designs.design("digits")
CASE = DESIGN.cases[0]
METHOD = "fine-tuning"
TRAINING = jobs.Job("digits", DESIGN.cases[:2], (0, 1), None)
UNLEARNING = jobs.Job("digits", (CASE,), (0, 1), METHOD)


def row_of(piece, **fields):
    return piece.key() | fields


def trials(blinds, gaps):
    """The rows of all trials, with these scores."""
    pieces = jobs.missing(UNLEARNING, [])
    scores = zip(pieces, blinds, gaps, strict=True)
    return [row_of(piece, blind=blind, gap=gap) for piece, blind, gap in scores]


def test_training_lacks_two_models_for_each_case_and_seed():
    pieces = jobs.missing(TRAINING, [])
    assert len(pieces) == 2 * 2 * 2
    assert {(p.case, p.seed, p.model) for p in pieces} == {
        (case, seed, model) for case in DESIGN.cases[:2] for seed in (0, 1) for model in ("original", "retrained")
    }
    assert {(p.kind, p.method, p.trial) for p in pieces} == {("model", None, None)}
    made = [row_of(piece) for piece in pieces]
    assert jobs.missing(TRAINING, made[:3]) == pieces[3:]
    assert jobs.missing(TRAINING, made) == []


def test_a_method_without_rows_lacks_all_trials_and_not_yet_a_run():
    pieces = jobs.missing(UNLEARNING, [])
    assert [(p.kind, p.trial) for p in pieces] == [("trial", index) for index in range(DESIGN.trials)]
    assert {(p.method, p.seed, p.model) for p in pieces} == {(METHOD, DESIGN.tuning_seed, None)}


def test_a_method_with_some_trials_lacks_the_others():
    made = trials([3.0, 1.0, 2.0, 4.0], [3.0, 1.0, 2.0, 4.0])
    assert [p.trial for p in jobs.missing(UNLEARNING, [made[0], made[2]])] == [1, 3]


@pytest.mark.parametrize(("gaps", "chosen"), [([9.0, 2.0, 9.0, 9.0], [1]), ([9.0, 9.0, 9.0, 2.0], [1, 3])])
def test_a_method_with_all_trials_lacks_a_run_for_each_seed_and_chosen_trial(gaps, chosen):
    made = trials([3.0, 1.0, 2.0, 4.0], gaps)
    pieces = jobs.missing(UNLEARNING, made)
    assert {(p.kind, p.seed, p.trial) for p in pieces} == {("run", seed, trial) for seed in (0, 1) for trial in chosen}
    assert len(pieces) == 2 * len(chosen)
    assert jobs.missing(UNLEARNING, [*made, row_of(pieces[0])]) == pieces[1:]
    assert jobs.missing(UNLEARNING, made + [row_of(piece) for piece in pieces]) == []


@pytest.mark.parametrize("field", ["kind", "method", "trial", "seed", "forget", "design", "design_version"])
def test_a_row_of_another_job_does_not_count(field):
    made = trials([3.0, 1.0, 2.0, 4.0], [3.0, 1.0, 2.0, 4.0])
    other = {"kind": "run", "method": "SalUn", "trial": 99, "seed": 99, "forget": "random:50%", "design": "other"}
    changed = [row | {field: other.get(field, 99)} for row in made]
    assert len(jobs.missing(UNLEARNING, changed)) == DESIGN.trials


def test_a_new_version_of_a_method_needs_new_rows(monkeypatch):
    made = trials([3.0, 1.0, 2.0, 4.0], [3.0, 1.0, 2.0, 4.0])
    raised = METHODS[METHOD]._replace(version=METHODS[METHOD].version + 1)
    monkeypatch.setitem(METHODS, METHOD, raised)
    assert len(jobs.missing(UNLEARNING, made)) == DESIGN.trials


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist-cnn", "fashion_mnist-resnet", "emoji-resnet"])
def test_the_saved_rows_complete_every_job_and_a_key_finds_one_of_them(name):
    made = rows.select(saved.read(ROWS), design=name)
    training, unlearning = runner.jobs_of(name, [], [], [])
    design = designs.design(name)
    assert {job.method for job in unlearning} == set(METHODS)
    assert len(unlearning) == len(METHODS) * len(design.cases)
    by_method = {method: [row for row in made if row.get("method") == method] for method in (None, *METHODS)}
    pieces = []
    # A method may have been added after the rows were made.
    for job in [job for job in training + unlearning if by_method[job.method]]:
        mine = by_method[job.method]
        assert jobs.missing(job, mine) == []
        trials = [row for row in mine if row["kind"] == "trial"]
        pieces += jobs.missing(job, trials) + (jobs.missing(job, []) if job.method else [])
    for piece in pieces:
        assert len(rows.select(by_method[piece.method], **piece.key())) == 1
    assert len(pieces) == len(made)
