"""Outputs of tiny Stable Diffusion models of diffusers and transformers; names, shapes and counts of the full ones.

Command: python tests/models/make_golden_stable_diffusion.py (needs torch, diffusers 0.42.1, transformers 5.24.0 and
safetensors, which are otherwise not needed; takes seconds)
Result: golden_stable_diffusion.json next to this file, which test_stable_diffusion.py compares with the models of this
package. Parameters and inputs come from a rule that both sides share, so that only outputs are stored.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

UNET = {"widths": (8, 16), "blocks": 2, "heads": 2, "context": 12, "groups": 4}
VAE = {"latent_channels": 2, "widths": (4, 8), "blocks": 1, "groups": 2}
TEXT = {"vocab": 20, "length": 7, "width": 12, "layers": 2, "heads": 3}


def seeded(name, shape):
    """The parameter of a published name and shape: kernels preserve the scale of their inputs, and nothing is zero."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("weight") and len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = np.sqrt(1 / np.prod(shape[1:])) if len(shape) > 1 else 0.3
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def inputs():
    """The inputs of the models, channels last."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "latents": normal(2, 6, 8, 4),
        "times": np.array([3, 871]),
        "embeddings": normal(2, 5, UNET["context"]),
        "images": normal(1, 8, 12, 3),
        "codes": normal(1, 3, 4, VAE["latent_channels"]),
        "tokens": rng.integers(0, TEXT["vocab"], (2, TEXT["length"])),
    }


def build(full):
    """The models by folder name, tiny or of the published sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if full:
        unet = {"cross_attention_dim": 768}
        levels, vae = 4, {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        text |= {"vocab_size": 49408, "max_position_embeddings": 77}
    else:
        unet = {"block_out_channels": UNET["widths"], "layers_per_block": UNET["blocks"]}
        unet |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        unet |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": UNET["heads"]}
        unet |= {"cross_attention_dim": UNET["context"], "norm_num_groups": UNET["groups"]}
        levels, vae = 2, {"block_out_channels": VAE["widths"], "layers_per_block": VAE["blocks"]}
        vae |= {"latent_channels": VAE["latent_channels"], "norm_num_groups": VAE["groups"]}
        text = {"hidden_size": TEXT["width"], "intermediate_size": 4 * TEXT["width"], "vocab_size": TEXT["vocab"]}
        text |= {"num_hidden_layers": TEXT["layers"], "num_attention_heads": TEXT["heads"]}
        text |= {"max_position_embeddings": TEXT["length"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return {
        "unet": UNet2DConditionModel(**unet),
        "vae": AutoencoderKL(**vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu", layer_norm_eps=1e-5)),
    }


def saved(model, folder):
    """The tensors that the model itself saves, under their published names."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder, safe_serialization=True)
    return load_file(next(Path(folder).glob("*.safetensors")))


def fill(model, folder):
    """The model with parameters of the shared rule, loaded from the file that it saves itself."""
    from safetensors.numpy import save_file

    tensors = {name: seeded(name, value.shape) for name, value in saved(model, folder).items()}
    save_file(tensors, next(Path(folder).glob("*.safetensors")), metadata={"format": "pt"})
    return type(model).from_pretrained(folder).eval()


def layout(shapes):
    """A digest of names and shapes, in which a 1x1 convolution counts as a dense layer."""
    flat = {name: list(shape[:2] if tuple(shape[2:]) == (1, 1) else shape) for name, shape in shapes.items()}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def epsilons(model):
    """The epsilons of all norms, by name."""
    import torch

    kinds = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    return {name: module.eps for name, module in model.named_modules() if isinstance(module, kinds)}


def main(folder=None):
    """Writes the golden file, and the tiny models if a folder for them is given."""
    import tempfile

    import diffusers
    import torch
    import transformers

    golden = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    golden |= {"transformers": transformers.__version__}
    with torch.device("meta"):
        models = build(full=True)
    golden["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    shapes = lambda model: {name: tuple(p.shape) for name, p in model.named_parameters()}
    golden["layouts"] = {name: layout(shapes(model)) for name, model in models.items()}

    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    golden["alpha_bar"] = {t: scheduler.alphas_cumprod[t].item() for t in (0, 1, 500, 999)}

    first = lambda array: torch.from_numpy(array.transpose(0, 3, 1, 2).copy())
    last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy().tolist()
    given = inputs()
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        models = {name: fill(model, Path(folder or temporary) / name) for name, model in build(full=False).items()}
        golden["shapes"] = {name: shapes(model) for name, model in models.items()}
        golden["epsilons"] = {name: epsilons(model) for name, model in models.items()}
        times, context = (torch.from_numpy(given[name]) for name in ("times", "embeddings"))
        golden["prediction"] = last(models["unet"](first(given["latents"]), times, context).sample)
        found = models["vae"].encode(first(given["images"])).latent_dist
        golden["mean"], golden["logvar"] = last(found.mean), last(found.logvar)
        golden["decoded"] = last(models["vae"].decode(first(given["codes"])).sample)
        golden["embedded"] = models["text_encoder"](torch.from_numpy(given["tokens"])).last_hidden_state.tolist()
    text = json.dumps(golden)
    Path(__file__).with_name("golden_stable_diffusion.json").write_text(text + "\n")


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
