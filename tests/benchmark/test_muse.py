"""The figures of MUSE, with a bigram table over bytes as the language model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax.benchmark import muse, reading
from eupmu_jax.metrics import privleak
from eupmu_jax.models.language import LanguageModel, Tokenizer

pytest.importorskip("rouge_score", reason="needs rouge-score")

# The model continues any colon and any of these characters with "ab ab ab ..." for ever.
FOLLOWS = {":": "a", "a": "b", "b": " ", " ": "a"}


@pytest.fixture
def reader(byte_tokens):
    table = np.zeros((128, 128), np.float32)
    for before, after in FOLLOWS.items():
        table[ord(before), ord(after)] = 9
    apply = lambda params, tokens: params[tokens]
    decode = lambda params, tokens, positions, cache: (params[tokens], cache)
    language = LanguageModel(jnp.array(table), apply, None, decode, lambda n, length: {}, None, 0, None)
    return muse.Reader(language, Tokenizer(byte_tokens, 0, None, 128), length=12, batch=2)


@pytest.fixture
def folder(tmp_path):
    """A corpus in the layout of MUSE."""
    pair = lambda question, answer: {"question": question, "answer": answer}
    tables = {
        # 200 tokens, of which 128 are compared; and a text that the model does not continue.
        "verbmem/forget": [{"prompt": "So, a", "gt": "b " + "ab " * 66}, {"prompt": "So, a", "gt": "zz"}],
        "knowmem/forget_qa": [pair("Who?", "ab"), pair("Where?", "home"), pair("Why?", "ab")],
        "knowmem/retain_qa": [pair("When?", "1815")],
        "knowmem/forget_qa_icl": [pair("What?", "a")],
        "knowmem/retain_qa_icl": [pair("What?", "a"), pair("How?", "b")],
        "privleak/forget": ["ab ab ab ab and more", "ab a"],
        "privleak/holdout": ["zyx", "ab zyx", "wvu" * 9],
    }
    for name, rows in tables.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    return tmp_path


def test_figures_by_hand(reader, folder):
    found = muse.judge(reader, reader.language.params, muse.load(folder))
    # For one of two passages, the first 128 tokens are continued correctly.
    assert found["verbmem"] == pytest.approx(1 / 2)
    # 32 tokens are eleven words, one of which is the answer: precision 1 / 11 and recall 1 for two of three questions.
    assert found["knowmem"] == {"forget": pytest.approx(2 / 3 * 1 / 6), "retain": 0}
    assert found["separation"] == 1
    assert privleak(found["separation"], 0.5) == -100


def test_an_answer_that_begins_with_a_blank_line_is_empty(reader, folder, monkeypatch):
    # BUG: the blank line was stripped before the cut, so the text after it counted as the answer.
    corpus, made = muse.load(folder), [list(b"\n\nab")] * reader.batch
    monkeypatch.setattr(reading, "generate", lambda *given, **options: made)
    assert muse.knowledge(reader, None, corpus.forget, corpus.forget_examples) == 0


def test_passages_are_truncated_and_the_least_likely_tokens_count(reader):
    known = -np.log(np.exp(9) / (np.exp(9) + 127))
    other = -np.log(1 / (np.exp(9) + 127))
    scores = muse.membership(reader, reader.language.params, ["ab ab ab ab zzzzzzzz", "abzz", "ab ab z"])
    # Eleven known tokens after truncation; one of three; and two of six, since 2.4 is rounded down.
    expected = [known, other, (other + known) / 2]
    np.testing.assert_allclose(scores, -np.array(expected), rtol=1e-4)


def test_a_begin_token_precedes_the_text(reader):
    later = reader._replace(begin=":")
    known = -np.log(np.exp(9) / (np.exp(9) + 127))
    # With it, the first token is predicted too.
    assert muse.membership(later, reader.language.params, ["a"]) == pytest.approx(-known, rel=1e-3)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (11, "length: got 12 tokens and 0 new ones"),
        (132, "passages: got 5 tokens and 128 new ones"),
    ],
)
def test_lengths_beyond_the_context_are_refused_before_any_work(reader, folder, context, words):
    small = reader._replace(language=reader.language._replace(context=context))
    with pytest.raises(ValueError, match=f"^{words}, expected no more than the model's context of {context}$"):
        muse.judge(small, None, muse.load(folder))


def test_a_passage_without_a_token_to_predict_is_refused(reader, folder):
    corpus = muse.load(folder)._replace(held_out=("ab", "z"))
    with pytest.raises(ValueError, match=r"^held_out\[1\]: got fewer than 2 tokens, expected one after the first$"):
        muse.judge(reader, None, corpus)


@pytest.mark.parametrize(("passages", "given"), [("ab ab", "the text 'ab ab'"), ((), "no passages")])
def test_passages_that_are_no_list_of_texts_are_refused(reader, passages, given):
    # BUG: each letter was a passage of its own, and the error for none was one of NumPy that named nothing.
    with pytest.raises(ValueError, match=f"^passages: got {given}, expected a list of at least one text$"):
        muse.membership(reader._replace(begin=":"), reader.language.params, passages)


def test_a_batch_without_any_sequence_is_refused(reader, folder):
    # BUG: a division by zero that named nothing.
    empty = reader._replace(batch=0)
    for call in (
        lambda: muse.judge(empty, reader.language.params, muse.load(folder)),
        lambda: muse.verbatim(empty, reader.language.params, muse.load(folder).passages),
    ):
        with pytest.raises(ValueError, match=r"^batch: got 0, expected an int of at least 1$"):
            call()


def test_an_empty_part_is_refused_before_any_work(reader, folder):
    # BUG: an error of `max` that named nothing, or one of NumPy after half of the work.
    corpus = muse.load(folder)
    nobody = corpus.retain.take([])
    for part in ({"retain": nobody}, {"held_out": ()}):
        (name,) = part
        with pytest.raises(ValueError, match=f"^{name}: got an empty part, expected at least one question or passage$"):
            muse.judge(reader, None, corpus._replace(**part))
    # Questions without examples before them are fine.
    muse.check(reader, corpus._replace(retain_examples=nobody))
