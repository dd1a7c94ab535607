import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eupmu_jax.models.language import generate, load_huggingface
from eupmu_jax.models.language.adapter import from_parts
from eupmu_jax.models.language.generation import _run

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")

NEW = 6


@pytest.fixture(scope="module")
def load(write):
    @functools.cache
    def load(case):
        """A tiny model whose blocks outweigh its embedding, so that its answers do not repeat a single token."""
        model = load_huggingface(write(case))
        grown = {"layers": 3.0, "embedder": 0.1}
        params = {
            part: jax.tree.map(lambda leaf, part=part: grown.get(part, 1.0) * leaf, tree)
            for part, tree in model.params.items()
        }
        return model._replace(params=params)

    return load


def uncached(apply, params, prompt):
    """Greedy decoding that recomputes the whole sequence for each token."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + NEW):
        tokens[0, i] = np.argmax(np.asarray(apply(params, tokens))[0, i - 1])
    return tokens[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize(
    "case", ["qwen2", *(pytest.param(case, marks=pytest.mark.slow) for case in ("gemma2", "gemma3"))]
)
def test_prompts_of_any_length_are_continued_as_one_by_one_without_a_cache(case, load, language):
    """The sliding windows of Gemma 2 and 3 are shorter than these prompts."""
    model = load(case)
    prompts = [[5], language.tokens[0, :4].tolist(), language.tokens[1].tolist()]
    answers = generate(model, model.params, prompts, NEW)
    apply = jax.jit(model.apply)
    assert answers == [uncached(apply, model.params, prompt) for prompt in prompts]
    assert len({token for answer in answers for token in answer}) > 3


def test_a_later_piece_of_several_tokens_is_refused_for_the_windows_of_gemma_3():
    # BUG: logits were wrong by their own size, as google-tunix lays the windows as if the piece were the first.
    config = SimpleNamespace(num_layers=1, local_base_frequency=10_000)
    model = from_parts(None, {"w": np.ones(1, np.float32)}, (), config, None)
    with pytest.raises(ValueError, match=r"^tokens: got 2 from position 3 on, where google-tunix"):
        model.decode(model.params, np.zeros((1, 2), int), np.array([[3, 4]]), {})


def test_answers_stop_before_the_end_token_and_compile_once(load, language):
    model = load("qwen2")
    prompts = [language.tokens[0].tolist(), language.tokens[1, :7].tolist(), [3]]
    whole = generate(model, model.params, prompts, NEW)
    compiled = _run._cache_size()
    for end in range(language.golden["qwen2"]["config"]["vocab_size"]):
        cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
        assert generate(model, model.params, prompts, NEW, end=end) == cut
    assert generate(model, jax.tree.map(jax.numpy.negative, model.params), prompts, NEW) != whole
    assert _run._cache_size() == compiled
    ends = whole[0][2], whole[2][1]
    first = [min((answer.index(end) for end in ends if end in answer), default=NEW) for answer in whole]
    cut = [answer[:count] for answer, count in zip(whole, first, strict=True)]
    assert generate(model, model.params, prompts, NEW, end=ends) == cut


@pytest.mark.slow
def test_parameters_in_another_dtype_than_the_loaded_one_can_generate(load, language):
    # BUG: the cache had the dtype in which the model was loaded.
    model = load("qwen2")
    prompts = [language.tokens[0, :4].tolist()]
    narrow = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), model.params)
    assert len(generate(model, narrow, prompts, NEW)[0]) == NEW
    mixed = model.params | {"embedder": narrow["embedder"]}
    assert len(generate(model, mixed, prompts, NEW)[0]) == NEW


def test_nan_logits_are_warned_about(load, language, caplog):
    # BUG: NaN logits give token 0 again and again, which ROUGE takes for forgotten.
    model = load("qwen2")
    generate(model, jax.tree.map(lambda leaf: leaf * np.nan, model.params), [[1], [2, 3]], NEW)
    assert "params: the logits after 2 of 2 prompts are NaN" in caplog.text


def test_invalid_prompts_and_lengths_are_refused_before_the_first_step(write):
    model = load_huggingface(write("llama"))._replace(decode=None)
    with pytest.raises(ValueError, match=r"prompts: got 60 tokens and 5 new ones, expected at most .* 64"):
        generate(model, model.params, [[1] * 60, [2]], 5)
    with pytest.raises(ValueError, match=r"prompts: got lengths \[2, 0\], expected"):
        generate(model, model.params, [[1, 2], []], 5)
    with pytest.raises(ValueError, match=r"prompts: got lengths \[\], expected"):
        generate(model, model.params, [], 5)
    with pytest.raises(ValueError, match="max_new_tokens: got 0, expected an int of at least 1"):
        generate(model, model.params, [[1]], 0)
    with pytest.raises(ValueError, match=r"max_new_tokens: got 3\.0, expected an int"):
        generate(model, model.params, [[1]], 3.0)
    with pytest.raises(ValueError, match="prompts: got one that is not a list of ints"):
        generate(model, model.params, [1, 2], 3)
    with pytest.raises(ValueError, match="prompts: got one that is not a list of ints"):
        generate(model, model.params, [[1.7, 2.2]], 3)
    for token in (-1, 10**6):
        with pytest.raises(ValueError, match=f"prompts: got token {token}, expected tokens of the model, 0 to "):
            generate(model, model.params, [[1, token]], 3)
    # BUG: no answer ended.
    with pytest.raises(ValueError, match=r"end: got token 1000000, expected a token of the model, 0 to "):
        generate(model, model.params, [[1]], 3, end=np.array([2, 10**6]))
