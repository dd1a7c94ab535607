"""Parameters written in Hugging Face's format."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupmu_jax.models.language import load_huggingface, save_huggingface

pytest.importorskip("tunix", reason="needs google-tunix, of the extra `language`")
load_file = pytest.importorskip("safetensors.numpy").load_file


@pytest.mark.parametrize("case", ["llama3", "qwen3", "gemma_multi_head", "gemma3"])
def test_parameters_are_written_as_they_were_read(case, write, tmp_path):
    source, folder = write(case, also=("model.layers.0.self_attn.rotary_emb.inv_freq",)), tmp_path / "unlearned"
    (source / "tokenizer.json").write_text("{}")
    save_huggingface(load_huggingface(source).params, source, folder)
    for path in source.glob("*.safetensors"):
        given, found = load_file(path), load_file(folder / path.name)
        assert found.keys() == given.keys()
        for name in given:
            np.testing.assert_array_equal(found[name], given[name])
    assert (folder / "tokenizer.json").exists()


def test_unlearned_parameters_of_another_dtype_can_be_loaded_again(write, tmp_path):
    source = write("llama", also=("lm_head.weight",), tie_word_embeddings=True, torch_dtype="float32", dtype="float32")
    params = jax.tree.map(lambda leaf: 2 * leaf, load_huggingface(source, jnp.bfloat16).params)
    # BUG: the configuration of a read-only source was copied with its permissions, and could not be replaced.
    (source / "config.json").chmod(0o444)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {}}))
    save_huggingface(params, source, tmp_path)
    # BUG: the index gave the bytes of the weights in the dtype of the source.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    written = [*jax.tree.leaves(params), params["embedder"]["input_embedding"]]
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in written)
    assert (tmp_path / "config.json").stat().st_mode & 0o200
    chex.assert_trees_all_equal(load_huggingface(tmp_path, jnp.bfloat16).params, params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_parameters_that_cannot_be_written_leave_no_folder(write, tmp_path):
    source = write("qwen2")
    params = load_huggingface(source).params
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    norm = lambda size, dtype: params | {"final_norm": {"w": np.zeros(size, dtype)}}
    cases = {
        "^params: got float16, float32, expected a single dtype": norm(32, np.float16),
        r"^params: leaf .* has shape \(3,\), but \(32,\) in the model's": norm(3, np.float32),
        "^params: got no leaf .*, expected the structure of the model's": {"layers": params["layers"]},
    }
    for words, given in cases.items():
        with pytest.raises(ValueError, match=words):
            save_huggingface(given, source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match=r"used, which is not empty, expected a new folder"):
        save_huggingface(params, source, tmp_path / "used")
