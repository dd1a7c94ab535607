"""Forward passes and running statistics against those of PyTorch with the same weights; see make_golden.py."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eupmu_jax.models import VGG16, ResNet8, ResNet18, ViT, functional

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
RULES = runpy.run_path(str(FOLDER / "make_golden.py"))
MODELS = {
    "resnet8": lambda rngs: ResNet8(10, 1, rngs=rngs),
    "resnet18": lambda rngs: ResNet18(10, 3, rngs=rngs),
    "vgg16": lambda rngs: VGG16(10, 3, rngs=rngs),
    "vgg16_28": lambda rngs: VGG16(10, 1, rngs=rngs),
    "vit": lambda rngs: ViT(10, 1, **RULES["VIT"], rngs=rngs),
}
NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_name(path):
    *layers, leaf = (str(entry.key) for entry in path)
    return ".".join([*layers, NAMES.get(leaf, leaf)])


def seeded(path, leaf):
    """The values of the shared rule in this package's layout; kernels of PyTorch have outputs first and space last."""
    name, shape = torch_name(path), leaf.shape
    if name == "embed.weight":
        size, width = RULES["VIT"]["patch_size"], shape[-1]
        kernel = RULES["seeded"](name, (width, shape[0] // size**2, size, size))
        return jnp.asarray(kernel.transpose(2, 3, 1, 0).reshape(shape))
    if ".attention." in name and not name.endswith("out.bias"):
        outputs = shape[-1] if ".out." in name else shape[-2] * shape[-1]
        torch_shape = (outputs, leaf.size // outputs) if name.endswith("weight") else (outputs,)
        return jnp.asarray(RULES["seeded"](name, torch_shape).T.reshape(shape))
    if name.endswith("weight") and len(shape) > 1:
        value = RULES["seeded"](name, (shape[-1], shape[-2], *shape[:-2]))
        return jnp.asarray(value.transpose(*range(2, len(shape)), 1, 0))
    return jnp.asarray(RULES["seeded"](name, shape))


def find(tree, name):
    for key in name.split("."):
        tree = tree[int(key) if key.isdigit() else key]
    return tree


@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_and_running_statistics_match_pytorch(name):
    golden = json.loads((FOLDER / f"golden_{name}.json").read_text())
    shapes = nnx.eval_shape(lambda: MODELS[name](nnx.Rngs(0)))
    params, before, apply = functional(shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden["parameters"]
    params, before = (jax.tree_util.tree_map_with_path(seeded, tree) for tree in (params, before))

    step = jax.jit(apply, static_argnames="train")
    images = jnp.asarray(RULES["images"](name))
    for mode in ("eval", "train"):
        logits, after = step(params, before, images, train=mode == "train")
        expected = np.array(golden[mode])
        assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected), mode
        if mode == "eval":
            jax.tree.map(np.testing.assert_array_equal, after, before)

    for layer, theirs in golden["statistics"].items():
        old, new = (find(tree, layer) for tree in (before, after))
        np.testing.assert_allclose(new["mean"][:4], theirs["mean"], rtol=1e-4, atol=1e-5)
        # PyTorch updates with the unbiased variance, Flax with the biased one.
        unbiased = theirs["count"] / (theirs["count"] - 1)
        kept = 0.9 * old["var"][:4]
        np.testing.assert_allclose(kept + (new["var"][:4] - kept) * unbiased, theirs["var"], rtol=1e-4)
