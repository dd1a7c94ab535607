"""Logits and hidden activations of tiny language models of transformers, one for each architecture.

Command: python tests/models/make_golden_language.py [SMOLLM2.gguf]
(needs numpy, torch 2.15 and transformers 5.12, and for the real model gguf and accelerate; a minute)
Result: golden_language.json and, if the file is given, golden_smollm2.json next to this file, which the tests of
language models compare with those of this package.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("golden_language.json")
SMOLLM2 = Path(__file__).with_name("golden_smollm2.json")
SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def rope(base):
    return {"rope_parameters": {"rope_theta": base, "rope_type": "default"}}


# Of the four periods of a head of eight, one is kept, one lies between and two are lengthened.
SCALED = rope(100_000.0)
SCALED["rope_parameters"] |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["rope_parameters"] |= {"original_max_position_embeddings": 256}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4}
CASES = {
    "llama": ("Llama", {**rope(100_000.0), "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "llama3": ("Llama", {**SCALED, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    # The only one without an entry for the size of a head, which is then that of the width.
    "qwen2": ("Qwen2", {**rope(10_000.0), "hidden_size": 32}),
    "qwen3": ("Qwen3", {**rope(1_000_000.0), "tie_word_embeddings": True}),
    "gemma": ("Gemma", {}),
    "gemma_multi_head": ("Gemma", {"num_key_value_heads": 4}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
}


def seeded(name, shape):
    """The tensor of a name, by a rule that both sides share."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def tokens():
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 10))


def main():
    """Writes the golden file."""
    import torch
    import transformers

    golden = {}
    for name, (kind, settings) in CASES.items():
        sizes = {key: value for key, value in SIZES.items() if kind != "Qwen2" or key != "head_dim"}
        config = getattr(transformers, f"{kind}Config")(
            **sizes | settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager"
        )
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            for tensor_name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(seeded(tensor_name, tuple(tensor.shape))))
            outputs = model(torch.from_numpy(tokens()), output_hidden_states=True)
        golden[name] = {
            "config": json.loads(config.to_json_string(use_diff=False)),
            "shapes": {tensor_name: list(tensor.shape) for tensor_name, tensor in tensors.items()},
            "logits": np.asarray(outputs.logits, float).round(5).tolist(),
            "hidden": np.asarray(outputs.hidden_states[1][:, -1], float).round(5).tolist(),
        }
    kept = ("activation", "attn", "base_freq", "bias", "eps", "head", "hidden", "intermediate", "layer_types")
    kept += ("logit", "max_position", "model_type", "rope", "sliding", "tie", "vocab")
    for case in golden.values():
        case["config"] = {key: value for key, value in case["config"].items() if any(word in key for word in kept)}
    FILE.write_text(json.dumps(golden) + "\n")
    for argument in sys.argv[1:]:
        SMOLLM2.write_text(json.dumps(smollm2(Path(argument))) + "\n")


def smollm2(path):
    """The answer of the real model to a question, and the first of its logits before it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question = "What is the capital of Japan?"
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**chat).logits[0, -1]
        answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1] :]
    return {
        "question": question,
        "tokens": chat["input_ids"][0].tolist(),
        "logits": np.asarray(logits[:512], float).round(4).tolist(),
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
    }


if __name__ == "__main__":
    main()
