"""Language models against those of transformers with the same weights; see make_golden_language.py."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from eupmu_jax import sharding, tasks
from eupmu_jax.models.language import from_tunix, load_huggingface

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")

CASES = ("llama", "llama3", "qwen2", "qwen3", "gemma", "gemma_multi_head", "gemma2", "gemma3")
SLOW = ("gemma", "gemma_multi_head", "gemma3")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_logits_and_hidden_activations_match_transformers(case, write, language):
    model = load_huggingface(write(case))
    both = jax.jit(lambda params, tokens: (model.apply(params, tokens), model.hidden(params, tokens, 1)))
    logits, hidden = both(model.params, language.tokens)
    assert np.ptp(language.golden[case]["logits"]) > 1
    np.testing.assert_allclose(logits, language.golden[case]["logits"], atol=1e-4)
    np.testing.assert_allclose(hidden[:, -1], language.golden[case]["hidden"], atol=1e-4)
    assert model.context == 64
    # Tokens on the right do not affect those before them.
    padded, _ = both(model.params, np.where(np.arange(language.tokens.shape[1]) < 6, language.tokens, 0))
    np.testing.assert_array_equal(padded[:, :6], logits[:, :6])
    parameters = sum(int(np.prod(shape)) for shape in language.golden[case]["shapes"].values())
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == parameters


def test_the_model_works_in_the_language_task(write, language):
    model = load_huggingface(write("llama"))
    task = tasks.language(model.apply)
    batch = {"tokens": jnp.asarray(language.tokens)}

    def loss(params):
        return task.retain(task.outputs(params, batch, None), batch)

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    probabilities = jax.nn.log_softmax(np.array(language.golden["llama"]["logits"]))[:, :-1]
    expected = -np.take_along_axis(np.asarray(probabilities), language.tokens[:, 1:, None], -1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not [path for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if not jnp.any(leaf)]


@pytest.mark.slow
def test_bfloat16_logits_are_close(write, language):
    model = load_huggingface(write("qwen3"), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(model.params, language.tokens)
    np.testing.assert_allclose(logits, language.golden["qwen3"]["logits"], atol=0.1)


def test_scaled_positions_change_the_logits(language):
    """Both cases have the same weights, so matching the golden logits of one rules out the other's positions."""
    scaled, plain = (np.asarray(language.golden[case]["logits"]) for case in ("llama3", "llama"))
    assert np.abs(scaled - plain).max() > 0.01


def test_old_configuration_formats_are_equivalent(write, language):
    new = load_huggingface(write("llama3"))
    scaling = dict(language.golden["llama3"]["config"]["rope_parameters"])
    entries = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    old = load_huggingface(write("llama3", rope_parameters=None, **entries))
    assert old.module(old.params).config == new.module(new.params).config
    new = load_huggingface(write("gemma3"))
    entries = {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": None}
    old = load_huggingface(write("gemma3", **entries, sliding_window_pattern=6))
    assert old.module(old.params).config == new.module(new.params).config


LLAMA_3 = {"rope_theta": 1e5, "rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("case", "settings", "words"),
    [
        ("llama", {"model_type": "mistral"}, "got architecture mistral, expected one of llama, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "got hidden_act gelu, expected silu"),
        ("llama", {"rope_parameters": LLAMA_3}, "rope_parameters: got no low_freq_factor, expected one"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "got rope_type llama3, expected default"),
        ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "got rope_type linear"),
        ("llama", {"rms_norm_eps": None}, "got no rms_norm_eps, expected one"),
        ("qwen2", {"use_sliding_window": True}, "got use_sliding_window True, expected False"),
        ("qwen3", {"rope_parameters": {"rope_theta": 5e6}}, "got rope_theta 5000000.0, expected 1000000"),
        ("gemma", {"rope_parameters": {"rope_theta": 2e4}}, "got rope_theta 20000.0, expected 10000"),
        ("gemma", {"rms_norm_eps": 1e-5}, "got rms_norm_eps 1e-05, expected 1e-06"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "got query_pre_attn_scalar 16, expected 8"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "got layer_types"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "got final_logit_softcapping 30.0, expected null"),
    ],
)
def test_what_google_tunix_does_not_compute_is_refused(case, settings, words, write):
    folder = write(case, **settings)
    with pytest.raises(ValueError, match=words) as caught:
        load_huggingface(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without": ["model.norm.weight"]}, "got no tensor model.norm.weight, expected"),
        (
            {"without": ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]},
            "model.norm.weight and 1 more",
        ),
        ({"also": ["model.layers.0.self_attn.q_proj.bias"]}, "lacks, model.layers.0.self_attn.q_proj.bias"),
        ({"vocab_size": 30}, r"got model.embed_tokens.weight of shape \(29, 24\), expected \(30, 24\)"),
        ({"num_key_value_heads": 1}, r"k_proj.weight of shape \(16, 24\), expected \(8, 24\)"),
        ({"num_hidden_layers": 1}, "a tensor that the architecture lacks, model.layers.1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words, write):
    with pytest.raises(ValueError, match=words):
        load_huggingface(write("llama", **change))


def test_unneeded_tensors_are_ignored(write, language):
    load_huggingface(write("llama", also=["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]))


def test_missing_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without config.json and \*.safetensors, expected"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type": "llama",'),
        ("config.json", b"\xff\xfe"),
        ("model-0.safetensors", b""),
        ("model-1.safetensors", None),
    ],
)
def test_a_damaged_file_is_named(write, name, content):
    path = write("llama") / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=f"^{path}: got a file that cannot be read .*, expected a complete one$"):
        load_huggingface(path.parent)


def test_a_configuration_without_entries_is_refused(write):
    path = write("llama") / "config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"^{path}: got a list, expected a JSON object$"):
        load_huggingface(path.parent)


def test_layers_out_of_range_are_refused(write, language):
    model = load_huggingface(write("llama"))
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 2"):
            model.hidden(model.params, language.tokens, layer)


def test_sequences_beyond_the_context_are_refused_and_those_within_are_not(write):
    model = load_huggingface(write("llama"))
    words = "tokens: got 65 in a sequence, expected at most the model's context of 64"
    for function in (model.apply, lambda params, tokens: model.hidden(params, tokens, 1)):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(function, model.params, jnp.zeros((2, 65), int))
        assert jax.eval_shape(function, model.params, jnp.zeros((2, 64), int)).shape[:2] == (2, 64)


def tiny_of_tunix(module, kind, **more):
    """A tiny decoder as a user of google-tunix would build it."""
    sizes = {"num_layers": 1, "embed_dim": 8, "hidden_dim": 16, "num_heads": 2, "head_dim": 4, "num_kv_heads": 1}
    config = module.ModelConfig(**sizes, vocab_size=11, norm_eps=1e-6, **more)
    return getattr(module, kind)(config, rngs=nnx.Rngs(0))


def test_a_wrapped_tunix_model_gives_the_same_logits():
    from tunix.models.llama3 import model as llama3

    made = nnx.jit(lambda: tiny_of_tunix(llama3, "Llama3", rope_theta=1_000_000))()
    tokens, positions = jnp.array([[1, 5, 3, 7]]), jnp.arange(4)[None]
    expected = jax.jit(lambda: made(tokens, positions, None, jnp.tri(4, dtype=bool)[None])[0])()
    model = from_tunix(made, context=16)
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, tokens), expected, rtol=1e-6)
    assert (model.layers, model.context) == (1, 16)
    np.testing.assert_array_equal(model.module(model.params).final_norm.w[...], made.final_norm.w[...])
    with pytest.raises(ValueError, match="expected a filter that finds parameters"):
        from_tunix(made, trainable=nnx.LoRAParam)
    with pytest.raises(ValueError, match="model: got SimpleNamespace without config, embedder, layers, final_norm"):
        from_tunix(SimpleNamespace())


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_google_tunix_still_ignores_the_rope_base(name):
    """If this fails, it no longer does: stop refusing Qwen 3 for its base, and load Llama into its own class."""
    import importlib

    module = importlib.import_module(f"tunix.models.{name}.model")
    inputs = jnp.array([[1, 5, 3]]), jnp.arange(3)[None], None, jnp.tri(3, dtype=bool)[None]

    def program(base):
        graph, state = nnx.split(nnx.eval_shape(lambda: tiny_of_tunix(module, name.capitalize(), rope_theta=base)))
        return str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(*inputs)[0])(state))

    assert program(10) == program(1_000_000)


@pytest.mark.parametrize("case", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_rematerialised_blocks_give_the_same_gradients(write, language, case):
    folder, tokens = write(case), jnp.asarray(language.tokens)
    plain, again = (load_huggingface(folder, remat=remat) for remat in (False, True))
    slopes = lambda model: jax.grad(lambda params: jnp.mean(model.apply(params, tokens) ** 2))
    assert "remat" in str(jax.make_jaxpr(slopes(again))(again.params))
    assert "remat" not in str(jax.make_jaxpr(slopes(plain))(plain.params))
    one, other = (jax.jit(slopes(model))(model.params) for model in (plain, again))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_tensor_is_loaded_with_its_final_sharding(write):
    mesh, seen = sharding.make_mesh(), []

    def shardings(shapes):
        seen.append(shapes)
        return sharding.param_shardings(shapes, mesh, axes=("data", "model"))

    folder = write("llama")
    model, plain = load_huggingface(folder, jnp.bfloat16, shardings=shardings), load_huggingface(folder, jnp.bfloat16)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == shardings(seen[0])
    chex.assert_trees_all_equal(model.params, plain.params)
    with pytest.raises(ValueError, match=r"^shardings: got 1, expected one for each of \d+ parameters"):
        load_huggingface(folder, shardings=lambda shapes: [jax.sharding.NamedSharding(mesh, P())])


def test_parameters_of_another_model_are_named(write, language):
    model = load_huggingface(write("llama"))
    with pytest.raises(ValueError, match=r"^params: got no leaf .*, expected the structure of the model's"):
        model.apply({"layers": model.params["layers"]}, jnp.asarray(language.tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "copy.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes()),
            "which another file has too",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}'),
            "got quantised weights",
        ),
    ],
)
def test_duplicate_and_quantised_weights_are_refused(write, change, message):
    folder = write("llama")
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_huggingface(folder)


@pytest.mark.parametrize(("dtype", "kind"), [(jnp.int8, "I8"), (jnp.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensors_are_named_although_the_configuration_does_not_tell(write, dtype, kind):
    # BUG: int8 was read as if it were the weights, and float8 ended in an AttributeError of NumPy.
    from safetensors.flax import save_file

    folder = write("llama", without=["model.norm.weight"])
    save_file({"model.norm.weight": jnp.ones(24, dtype)}, folder / "norm.safetensors")
    with pytest.raises(ValueError, match=f"^{folder}: got model.norm.weight in {kind}, expected weights in floating"):
        load_huggingface(folder)


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_only_floating_point_dtypes_are_accepted(write, dtype):
    with pytest.raises(ValueError, match=f"^dtype: got '{dtype}', expected a floating-point dtype such as 'bfloat16'"):
        load_huggingface(write("llama"), dtype)


def adapted_of_tunix(**more):
    """A user's model with adapters added by qwix."""
    qwix = pytest.importorskip("qwix", reason="needs qwix, of the extra `language`")
    from tunix.models.qwen2 import model as qwen2

    made = nnx.jit(lambda: tiny_of_tunix(qwen2, "Qwen2", rope_theta=10_000, **more))()
    provider = qwix.LoraProvider(module_path=".*mlp.*", rank=2, alpha=4.0)
    return qwix.apply_lora_to_model(made, provider, **made.get_model_input(), rngs=nnx.Rngs(params=1))


@pytest.mark.slow
def test_a_users_own_adapters_can_be_trained_and_written_back_with_remat():
    # BUG: Flax raised its own error about a variable of another trace.
    from tunix.models.qwen2.model import RematConfig

    made, tokens = adapted_of_tunix(remat_config=RematConfig.BLOCK), jnp.array([[1, 5, 3, 7]])
    model = from_tunix(made, trainable=nnx.LoRAParam)
    assert len(jax.tree.leaves(model.params)) == 6
    slopes = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, tokens) ** 2)))(model.params)
    moved = jax.tree.map(lambda leaf, slope: leaf - 5 * slope, model.params, slopes)
    expected = jax.jit(model.apply)(moved, tokens)
    nnx.update(made, moved)
    positions, seen = jnp.arange(4)[None], jnp.tri(4, dtype=bool)[None]
    np.testing.assert_allclose(nnx.jit(lambda made: made(tokens, positions, None, seen)[0])(made), expected, atol=1e-5)


def test_training_the_base_under_adapters_is_warned_about(caplog):
    from_tunix(adapted_of_tunix(), trainable=nnx.LoRAParam)
    assert not caplog.text
    from_tunix(adapted_of_tunix())
    assert "trainable: the model has 6 arrays of adapters, but" in caplog.text
