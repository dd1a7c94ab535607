import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.data.questions import PROMPT, Questions, tokenized

END = 256
encode = lambda text: list(text.encode())
texts = st.text(max_size=20)
answers = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=4), st.integers(0, 5))
def test_rows_consist_of_prompt_answer_end_and_padding(pairs, spare):
    asked, told = zip(*pairs, strict=True)
    prompts = [encode(f"Question: {question}\nAnswer:") for question in asked]
    rows = [[*prompt, *encode(" " + answer), END] for prompt, answer in zip(prompts, told, strict=True)]
    length = max(map(len, rows)) + spare
    batch = tokenized(asked, told, encode, length=length, end=END)
    assert batch["tokens"].shape == batch["mask"].shape == (len(pairs), length)
    assert batch["tokens"].dtype == np.int32
    assert batch["mask"].dtype == bool
    for k, row in enumerate(rows):
        assert batch["tokens"][k, : len(row)].tolist() == row
        assert batch["mask"][k].tolist() == [len(prompts[k]) <= t < len(row) for t in range(length)]
        predicted = batch["tokens"][k][batch["mask"][k]].tolist()
        assert (bytes(predicted[:-1]).decode(), predicted[-1]) == (" " + told[k], END)


@given(st.lists(st.tuples(texts, answers), min_size=2, max_size=4))
def test_a_row_does_not_depend_on_the_others(pairs):
    asked, told = zip(*pairs, strict=True)
    whole = tokenized(asked, told, encode, length=200, end=END)
    for k in range(len(pairs)):
        alone = tokenized(asked[k : k + 1], told[k : k + 1], encode, length=200, end=END)
        assert all(np.array_equal(alone[name][0], whole[name][k]) for name in whole)


@given(texts, answers, answers)
def test_the_prompt_is_the_same_before_every_answer(question, one, other):
    batch = tokenized([question] * 2, [one, other], encode, length=200, end=END)
    starts = np.argmax(batch["mask"], axis=1)
    assert starts[0] == starts[1]
    np.testing.assert_array_equal(*batch["tokens"][:, : starts[0]])


def test_the_template_is_taken_literally():
    batch = tokenized(["a {answer}?"], ["{question}"], encode, length=40, end=0, template="<s>{question}\n{answer}")
    assert bytes(batch["tokens"][0][~batch["mask"][0]].tolist()).rstrip(b"\0") == b"<s>a {answer}?\n"
    assert bytes(batch["tokens"][0][batch["mask"][0]].tolist()) == b"{question}\0"


def test_a_question_that_does_not_fit_is_named_with_its_excess():
    asked, told = ["Who?", "When?"], ["Ada.", "In December 1815."]
    needed = len(PROMPT.format(question=asked[1], answer=told[1])) + 1
    tokenized(asked, told, encode, length=needed, end=0)
    expected = rf"answers\[1\]: got {needed} tokens with prompt and end, 2 more than length {needed - 2}: 'When\?'"
    with pytest.raises(ValueError, match=expected):
        tokenized(asked, told, encode, length=needed - 2, end=0)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_answer_is_refused(empty):
    with pytest.raises(ValueError, match=r"answers\[1\]: got '.*', expected some text after 'When\?'"):
        tokenized(["Who?", "When?"], ["Ada.", empty], encode, length=99, end=0)


@pytest.mark.parametrize("end", [None, -1, "<end>", 1.0, True])
def test_an_end_token_is_required(end):
    with pytest.raises(ValueError, match=r"end: got .*, expected the id of the end token"):
        tokenized(["Who?"], ["Ada."], encode, length=99, end=end)


@pytest.mark.parametrize(
    "template", ["", "{question}", "{answer}", "{question} {answer}\n", "{question}{question}{answer}"]
)
def test_invalid_templates_are_refused(template):
    with pytest.raises(ValueError, match="template: got "):
        tokenized(["Who?"], ["Ada."], encode, length=99, end=0, template=template)


def test_there_must_be_as_many_answers_as_questions():
    with pytest.raises(ValueError, match="answers: got 1, expected one for each of 2 questions"):
        tokenized(["Who?", "When?"], ["Ada."], encode, length=99, end=0)


@pytest.mark.parametrize("length", [None, 0, -1, 99.0])
def test_a_length_that_is_no_number_of_tokens_is_refused(length):
    # BUG: errors of NumPy that named no argument.
    with pytest.raises(ValueError, match=f"^length: got {length}, expected an int of at least 1$"):
        tokenized(["Who?"], ["Ada."], encode, length=length, end=0)


@pytest.mark.parametrize(("given", "name"), [(("Who?", "Ada!"), "questions"), ((["Who?"] * 4, "Ada!"), "answers")])
def test_a_single_text_is_refused(given, name):
    # BUG: each letter was a question or an answer of its own.
    with pytest.raises(ValueError, match=f"^{name}: got the text '.*', expected a list of texts$"):
        tokenized(*given, encode, length=99, end=0)


def test_take_selects_rows_in_order():
    pairs = Questions(("a", "b", "c"), ("A", "B", "C"), np.array([5, 6, 7], np.int32), wrong_answers=((), ("x",), ()))
    some = pairs.take(np.array([2, 1]))
    assert (some.question, some.answer, some.wrong_answers) == (("c", "b"), ("C", "B"), ((), ("x",)))
    assert some.person.tolist() == [7, 6]
    assert some.refusal is None
    assert pairs.take([]).question == ()


def test_an_answer_is_tokenised_as_part_of_the_whole_text():
    # Like SentencePiece, attach a blank to the word after it and prepend one to the text.
    words = {word: number for number, word in enumerate(["_A:", "_Ada", "__Ada", "_B:"], 1)}
    encode = lambda text: [words[word] for word in ("_" + text.replace(" ", " _")).split(" ")]
    batch = tokenized(["A:", "B:"], ["Ada", "Ada"], encode, length=4, end=0, template="{question} {answer}")
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 0, 0], [4, 2, 0, 0]])
    np.testing.assert_array_equal(batch["mask"], [[False, True, True, False]] * 2)


def test_rows_may_be_selected_by_a_mask():
    # BUG: True and False were taken for rows 1 and 0.
    pairs = Questions(("a", "b", "c"), ("1", "2", "3"), np.arange(3))
    assert pairs.take(np.array([True, False, True])).answer == ("1", "3")
    assert pairs.take([2, 0]).answer == ("3", "1")
    assert pairs.take([]).answer == ()
    with pytest.raises(IndexError):
        pairs.take(np.array([True, False]))


def test_an_encoder_that_adds_the_end_token_is_refused():
    # BUG: an answer ended twice.
    with pytest.raises(ValueError, match=r"^encode: got the end token 256 after 'Ada\.', expected ids without added"):
        tokenized(["Who?"], ["Ada."], lambda text: [*encode(text), END], length=40, end=END)
    begun = tokenized(["Who?"], ["Ada."], lambda text: [1, *encode(text)], length=40, end=END)
    assert begun["tokens"][0, 0] == 1
