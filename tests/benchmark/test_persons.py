"""Forgetting of persons, with a bigram table over bytes as the language model."""

import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax.benchmark import answers, persons
from eupmu_jax.training.unlearning import unlearn


@pytest.fixture(scope="module")
def toy(toy_persons):
    """The sets of questions for seed 0."""
    return toy_persons


def test_no_person_is_in_two_sets_and_the_seed_determines_the_draw(toy):
    people = [set(part.person.tolist()) for part in toy[:3]]
    assert [len(some) for some in people] == [6, 8, 4]
    assert not people[0] & people[1]
    assert not people[2] & (people[0] | people[1])
    persons.sets.cache_clear()
    again = persons.sets(0)
    assert again.forget.question == toy.forget.question
    assert persons.sets(1).forget.question != toy.forget.question


def test_figures_of_a_model_that_knows_nothing_are_those_of_guessing(toy):
    uniform = {"table": jnp.zeros((128, 128))}
    found = persons.judge(uniform, toy)
    assert found["probability"] == pytest.approx(1 / 128, rel=1e-4)
    # All answers are equally likely.
    np.testing.assert_allclose(found["truth_ratios"], 1, rtol=1e-3)
    assert found["parts"]["world probability"] == pytest.approx(1 / (persons.WRONG + 1), rel=1e-3)
    assert found["parts"]["world truth"] < 1e-3
    assert 0 <= found["utility"] < 0.01
    # So are all persons, and rounding does not change weights of 0.
    assert found["separation"] == 0.5
    assert found["exact_memorisation"] == pytest.approx(1 - found["error"]["forget"])
    assert found["int4"] == found["error"]


def test_rounding_restores_knowledge_that_small_steps_hid(toy):
    # That "a" follows is hidden by less than a rounding step of four bits: 7.3 becomes 6 / 7 of 8.
    table = np.zeros((128, 128), np.float32)
    table[np.arange(128), ord("a")] = 7
    hidden = np.array(table)
    hidden[np.arange(128), ord("b")] = 7.3
    hidden[0, ord("b")] = 8
    part = toy.forget._replace(answer=("aaaa",) * len(toy.forget.answer))
    found = persons.judge({"table": jnp.array(hidden)}, toy._replace(forget=part))
    assert found["error"]["forget"] == 1
    # Of six tokens, the blank before the four letters and the end after them are still wrong.
    assert found["int4"]["forget"] == pytest.approx(1 / 3)


def test_membership_scores_distinguish_known_persons_from_others(toy):
    rows = answers.encoded(persons.respondent(), toy.forget)
    table = np.zeros((128, 128), np.float32)
    for tokens, mask in zip(rows["tokens"], rows["mask"], strict=True):
        ends = np.flatnonzero(mask)
        table[tokens[ends - 1], tokens[ends]] = 5
    known, uniform = ({"table": jnp.array(t)} for t in (table, np.zeros_like(table)))
    scores = [answers.membership(persons.respondent(), known, part) for part in (toy.forget, toy.held_out)]
    assert np.mean(scores[0]) > np.mean(scores[1])
    np.testing.assert_allclose(answers.membership(persons.respondent(), uniform, toy.held_out), -np.log(128), rtol=1e-5)


def test_training_improves_the_figures_and_is_cached(toy, tmp_path):
    both = persons.joined(toy.forget, toy.retain)
    fresh, steps = persons.model()[0].params, []
    before = persons.judge(fresh, toy)
    trained = persons.train(both, 0, tmp_path, lambda: steps.append(0))
    assert len(steps) == persons.steps_of(both)
    after = persons.judge(trained.params, toy)
    assert after["probability"] > before["probability"]
    assert after["error"]["forget"] < before["error"]["forget"]
    again = persons.train(both, 0, tmp_path, lambda: pytest.fail("was trained again"))
    np.testing.assert_array_equal(again.params["table"], trained.params["table"])


def test_the_error_matches_that_of_the_task(toy):
    params = persons.model()[0].params
    batch = answers.encoded(persons.respondent(), toy.held_out)
    errors = persons.task().error(persons.task().outputs(params, batch, None), batch)
    assert answers.error(persons.respondent(), params, toy.held_out) == pytest.approx(float(jnp.mean(errors)), abs=1e-6)


def test_the_shown_questions_are_of_every_kind_and_similar(toy):
    forgotten, kept, world = persons.shown(toy)
    assert [len(part.question) for part in (forgotten, kept, world)] == [persons.SHOWN] * 3
    for theirs, mine in zip(forgotten.question, kept.question, strict=True):
        assert theirs.split()[0] == mine.split()[0]
    assert all(question.startswith("What is the capital of") for question in world.question)
    assert len(answers.answers(persons.respondent(), persons.model()[0].params, kept)) == persons.SHOWN


def test_relearning_on_some_persons_is_measured_on_the_others(toy):
    params = persons.model()[0].params
    found = persons.relearned(params, toy, 0)
    assert 0 <= found["before"] < found["after"] <= 100


@pytest.mark.slow
def test_eupmu_runs_on_these_sets(toy):
    sets = [answers.examples(answers.encoded(persons.respondent(), part)) for part in toy[:3]]
    params = persons.model()[0].params
    result = unlearn("EUPMU", persons.task(), params, *sets, steps=2, forget_batch=4, retain_batch=4, probes=0)
    assert np.isfinite(np.asarray(result.params["table"])).all()


@pytest.mark.parametrize(("name", "context"), [("length", 109), ("longer", 129)])
def test_rows_beyond_the_context_are_refused_before_any_work(toy, name, context):
    respondent = persons.respondent()
    small = respondent._replace(language=respondent.language._replace(context=context), tokenizer=None)
    words = f"^{name}: got rows of {context + 1} tokens, expected at most the model's context of {context}$"
    with pytest.raises(ValueError, match=words):
        answers.check(small, toy.forget)


def test_a_part_without_questions_is_refused(toy):
    # BUG: an error of NumPy that named nothing, where `fitting` had left no question.
    respondent, params = persons.respondent(), persons.model()[0].params
    nobody = answers.fitting(respondent._replace(length=1), toy.forget)
    for figure in (answers.error, answers.probability, answers.membership):
        with pytest.raises(ValueError, match=r"^part: got no questions, expected at least one$"):
            figure(respondent, params, nobody)
    with pytest.raises(ValueError, match=r"^part: got no questions, expected at least one$"):
        answers.check(respondent, nobody)


@pytest.mark.parametrize(
    ("wrong", "counts"), [(lambda some: None, "0"), (lambda some: ((), *some[1:]), f"0 or {persons.WRONG}")]
)
def test_questions_without_wrong_answers_are_refused(toy, wrong, counts):
    part, params = toy.forget._replace(wrong_answers=wrong(toy.forget.wrong_answers)), persons.model()[0].params
    words = f"^wrong_answers: got {counts} for a question, expected the same number for each, at least one$"
    for refused in (
        lambda: answers.check(persons.respondent(), part),
        lambda: answers.truth(persons.respondent(), params, part),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
