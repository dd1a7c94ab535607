"""The TOFU experiment on a tiny model with questions in TOFU's format, and tokenizers in Hugging Face's format."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from eupmu_jax.benchmark import rows
from eupmu_jax.models.language import Tokenizer, huggingface_tokenizer
from experiments.tofu import run

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")
pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra `language`")

WORDS = [
    "<unk>",
    "<end>",
    "Question:",
    "Answer:",
    "who",
    "wrote",
    "what",
    "is",
    "a",
    "the",
    "of",
    "book",
    "city",
    "hill",
]


def save_tokenizer(folder, **config):
    """Saves a tokenizer of whole words in the layout of `save_pretrained`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.enable_padding(length=50)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"} | config))
    return folder


def save_tables(folder):
    """Saves small tables with the names and fields of TOFU's."""
    rng = np.random.default_rng(0)
    words = lambda count: " ".join(rng.choice(WORDS[4:], count))
    plain = lambda: {"question": words(4), "answer": words(3)}
    wrong = lambda count: {"perturbed_answer": [words(3) for _ in range(count)]}
    other = lambda: {"paraphrased_question": words(4), "paraphrased_answer": words(3)} | wrong(5)
    tables = {
        "forget05": [plain() for _ in range(20)],
        "retain95": [plain() for _ in range(40)],
        "holdout05": [plain() for _ in range(20)],
        "forget05_perturbed": [plain() | other() for _ in range(6)],
        "retain_perturbed": [plain() | other() for _ in range(5)],
        "real_authors_perturbed": [plain() | wrong(3) for _ in range(5)],
        "world_facts_perturbed": [plain() | wrong(3) for _ in range(5)],
    }
    for name, lines in tables.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# No case of EUPMU with adapters, since the tiny model knows nothing that EUPMU would have to forget.
@pytest.mark.parametrize(
    ("method", "rank", "more"),
    [
        ("EUPMU", 0, ()),
        *(
            pytest.param(method, rank, more.split(), marks=pytest.mark.slow)
            for method, rank, more in (
                ("weighted sum", 2, ""),
                ("EUPMU", 0, "--retain kl"),
                ("weighted sum", 2, "--objective dpo"),
                ("weighted sum", 2, "--objective lrml --retain-weight 1"),
                ("weighted sum", 2, "--objective undial"),
                ("weighted sum", 2, "--objective rmu"),
                ("weighted sum", 0, "--objective rmu --retain kl"),
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list | tuple) else None,
)
def test_a_model_is_unlearned_and_evaluated(write, tmp_path, monkeypatch, method, rank, more):
    pairs, plain = [], run.forget_quality
    monkeypatch.setattr(run, "forget_quality", lambda *pair: pairs.append(pair) or plain(*pair))
    folder, data = save_tokenizer(write("llama")), save_tables(tmp_path)
    arguments = ["--model", folder, "--retrained", folder, "--data", data, "--out", tmp_path / "out", "--forget", 5]
    arguments += ["--steps", 3, "--batch", 8, "--rank", rank, "--length", 24, "--answer", 4, "--dtype", "float32"]
    arguments += ["--method", method, *more]
    row = run.run(run.parsed([str(one) for one in arguments]), {})
    assert rows.read(tmp_path / "out" / "rows.jsonl")[0]["unlearned"]["utility"] == row["unlearned"]["utility"]
    assert len(row["unlearned"]["truth_ratios"]) == 6
    assert list(row["original"]["parts"]) == [
        f"{part} {figure}"
        for part in ("retain", "real_authors", "world_facts")
        for figure in ("probability", "rouge", "truth")
    ]
    assert row["forget_quality"] <= 0
    if not rank:
        # BUG: those of the same model were not the same, as only one side was rounded.
        assert pairs == [(row["unlearned"]["truth_ratios"], row["original"]["truth_ratios"])]
    assert row["original"]["truth_ratios"] != row["unlearned"]["truth_ratios"]


def test_commands_on_the_page_are_valid_for_the_script():
    text = Path(run.__file__).with_name("page.md").read_text()
    commands = re.findall(r"^(uv run .*tofu/run\.py (?:.*\\\n)*.*)$", text, re.MULTILINE)
    parsed = [run.parsed(shlex.split(one.replace("\\\n", "").split("run.py ")[1])) for one in commands]
    assert [(given.rank, given.batch % given.data_axis) for given in parsed] == [(0, 0), (16, 0)]
    for given in parsed:
        # The plan to be made beforehand is for as many devices.
        assert f"--tensor {given.tensor_axis} --batch {given.batch} --sequence {given.length}" in text
        assert given.data_axis * given.tensor_axis == 8


def test_a_template_with_line_breaks_written_out_is_refused(capsys):
    # BUG: the backslash and the n became part of every prompt.
    files = ["--model", "model", "--data", "data"]
    with pytest.raises(SystemExit):
        run.parsed([*files, "--template", r"Question: {question}\nAnswer: {answer}"])
    assert "got 'Question: {question}\\\\nAnswer: {answer}' with a backslash and an n" in capsys.readouterr().err
    assert run.parsed([*files, "--template", "{question}\n{answer}"]).template == "{question}\n{answer}"


def test_a_retrained_model_that_cannot_be_read_is_refused_before_any_unlearning(write, tmp_path):
    folder, data = save_tokenizer(write("llama")), save_tables(tmp_path)
    retrained = save_tokenizer(write("llama", without=["model.norm.weight"]))
    arguments = ["--model", folder, "--retrained", retrained, "--data", data, "--out", tmp_path / "out"]
    arguments += ["--forget", 5, "--steps", 3, "--batch", 8, "--length", 24, "--answer", 4, "--dtype", "float32"]
    with pytest.raises(ValueError, match=r"got no tensor model.norm.weight, expected those of the architecture"):
        run.run(run.parsed([str(one) for one in arguments]), {})
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_read_with_its_end_token_and_without_padding(tmp_path):
    tokenizer = huggingface_tokenizer(save_tokenizer(tmp_path, chat_template="{{ messages[0].content }}"))
    assert tokenizer.encode("who wrote the book") == [4, 5, 9, 11]
    assert tokenizer.decode([4, 11]) == "who book"
    assert (tokenizer.end, tokenizer.vocabulary) == (1, len(WORDS))
    assert tokenizer.chat([{"role": "user", "content": "a city"}]) == "a city"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert huggingface_tokenizer(save_tokenizer(tmp_path, chat_template=named)).template == "d"
    assert huggingface_tokenizer(save_tokenizer(tmp_path, eos_token={"content": "the"})).end == 9


def test_a_turn_ends_as_the_template_ends_it(tmp_path):
    # BUG: of Gemma's tokens, `<eos>` was taken, which no answer of an instruction model ends with.
    folder = save_tokenizer(tmp_path, chat_template="{{ messages }}<unk>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9, 0]}))
    found = huggingface_tokenizer(folder)
    assert found.tokenizer.id_to_token(found.end) == "<unk>"
    # BUG: generation went on beyond the other tokens, and what followed was part of the answer.
    assert found.stops == (1, 9)
    (folder / "chat_template.jinja").write_text("{{ messages }}{{ eos_token }}<unk>")
    found = huggingface_tokenizer(folder)
    assert found.tokenizer.id_to_token(found.end) == "<end>"


@pytest.mark.parametrize("end", [None, "<stop>"])
def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, end):
    save_tokenizer(tmp_path, eos_token=end)
    with pytest.raises(ValueError, match=f"got {end!r} as the token that ends an answer, expected a token of the"):
        huggingface_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path, name):
    path = save_tokenizer(tmp_path) / name
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=f"^{path}: got a file that cannot be read .*, expected a complete one$"):
        huggingface_tokenizer(tmp_path)


def test_a_template_of_another_tokenizer_is_refused(tmp_path):
    from tokenizers import Tokenizer

    save_tokenizer(tmp_path, chat_template="<|im_start|>{{ messages[0].content }}<|im_end|>")
    # If the tokenizer has neither of the two, they are ordinary text.
    huggingface_tokenizer(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.add_special_tokens(["<|im_end|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"got no special token <\|im_start\|>, expected those that the chat template"):
        huggingface_tokenizer(tmp_path)


def test_a_template_gets_the_special_tokens_and_may_refuse(tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]{% if tools is not none %}tools{% endif %}"
    save_tokenizer(tmp_path, bos_token={"content": "<unk>"}, eos_token="<end>", chat_template="{{ older }}")
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = huggingface_tokenizer(tmp_path)
    assert tokenizer.chat([{"role": "user", "content": "Ada"}]) == "<unk>[INST] Ada [/INST]"
    with pytest.raises(ValueError, match=r"^messages: got some that the chat template refuses: no system"):
        tokenizer.chat([{"role": "system", "content": "Be."}])


def test_lines_that_mark_what_to_train_on_leave_no_blank_lines():
    # BUG: the tags were deleted, and with them what Jinja removes around a tag.
    template = "{% for m in messages %}\n<{{ m.role }}>\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    assert Tokenizer(None, 0, template + "{% endfor %}", 2).chat(messages) == "<user>\nWho?\n<assistant>\nAda.\n"


def test_several_end_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got \['<end>', '<unk>'\] as eos_token, expected one token"):
        huggingface_tokenizer(save_tokenizer(tmp_path, eos_token=["<end>", "<unk>"]))
    found = huggingface_tokenizer(save_tokenizer(tmp_path, add_bos_token=True, bos_token=None, unk_token="<unk>"))
    assert found.special == {"eos_token": "<end>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Who?", r"messages: got 'Who\?', expected a list of dicts such as"),
        ({"role": "user", "content": "Who?"}, "messages: got .*role.*, expected a list of dicts"),
        (["Who?"], r"messages\[0\]: got 'Who\?', expected a list of dicts"),
        ([{"role": "user", "content": "Who?"}, {"role": "user", "text": "Who?"}], r"messages\[1\]: got .*text"),
    ],
)
def test_messages_that_a_template_would_render_as_empty_are_refused(messages, message):
    # BUG: each letter of a text became an empty message.
    template = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=f"^{message}"):
        Tokenizer(None, 0, template, 2).chat(messages)
