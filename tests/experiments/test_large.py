"""The command line for large diffusion models, on tiny models with random parameters."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eupmu_jax import data
from eupmu_jax.benchmark import rows
from eupmu_jax.data import Dataset
from eupmu_jax.models import stable_diffusion as sd
from experiments.diffusion import denoisers, large

ROOT = Path(__file__).parents[2]
SMALL = {"in_channels": 3, "patch_size": 4, "widths": (8,), "blocks": 1, "groups": 4}
UNET = sd.UNetConfig(widths=(8,), blocks=1, heads=2, context=12, groups=4)
TEXT = sd.TextEncoderConfig(vocab=20, length=7, width=12, layers=1, heads=3)
EIGHT = f"""
import json, sys
from experiments.diffusion import denoisers, large
from eupmu_jax.models import stable_diffusion as sd
denoisers.UNET, denoisers.TEXT, denoisers.LATENT = sd.{UNET}, sd.{TEXT}, (8, 8, 4)
print(json.dumps(large.run(large.parsed(sys.argv[1:]), {{}})))
"""


@pytest.fixture
def small(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.random((40, 32, 32, 3), np.float32)
    loaded = Dataset("cifar10", images, np.arange(40, dtype=np.int32) % 10, images, np.arange(40) % 10, 10)
    monkeypatch.setattr(data, "load", lambda name: loaded)
    for name, value in {"DDPM": SMALL, "UNET": UNET, "TEXT": TEXT, "LATENT": (8, 8, 4)}.items():
        monkeypatch.setattr(denoisers, name, value)


def run(*arguments):
    return large.run(large.parsed([str(one) for one in arguments]), {})


def folder_of(path):
    """Writes tiny weights in the published layout and two sets of captioned latents, and returns the arguments."""
    import jax
    from flax import nnx

    numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors, of the extra `diffusion`")
    rng = np.random.default_rng(0)
    for kind, config in ((sd.ConditionalUNet, UNET), (sd.TextEncoder, TEXT)):
        model = nnx.eval_shape(lambda kind=kind, config=config: kind(config, rngs=nnx.Rngs(0)))
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        tensors = {}
        for where, leaf in leaves:
            shape = sd.weights._stored_shape(where[-1].key == "kernel", leaf)
            tensors[sd.weights.published_name(where)] = 0.2 * rng.standard_normal(shape).astype(np.float32)
        file = path / sd.weights.FILES[kind]
        file.parent.mkdir(parents=True)
        numpy.save_file(tensors, file)
    captions = rng.integers(0, 18, (3, 7))
    for name, chosen in (("forget", [0] * 16), ("retain", [1, 2] * 12)):
        latents = rng.standard_normal((len(chosen), 8, 8, 4)).astype(np.float32)
        np.savez(path / f"{name}.npz", latents=latents, tokens=captions[chosen])
    return ["--weights", path, "--forget", path / "forget.npz", "--retain", path / "retain.npz"]


# After three training steps a model has almost nothing to forget.
@pytest.mark.filterwarnings("ignore:the run ends at")
@pytest.mark.long
def test_the_unet_of_cifar10_is_trained_and_forgets_a_class(small, tmp_path):
    arguments = ["cifar10", "--forget", 3, "--train-steps", 3, "--steps", 2, "--batch", 4, "--out", tmp_path]
    arguments += ["--settings", '{"target": 2.0, "limit": 3.0}', "--data-axis", 1]
    row = run(*arguments)
    assert set(row["figures"]) == {"original", "last", "returned"}
    assert row["settings"]["target"] == row["target"] == 2.0
    assert row["limit"] == 3.0
    assert len(rows.read(tmp_path / "rows.jsonl")) == 1


@pytest.mark.long
def test_stable_diffusion_forgets_a_caption_on_eight_devices(small, tmp_path, on_devices):
    arguments = ["stable-diffusion", *folder_of(tmp_path), "--steps", 2, "--batch", 8, "--out", tmp_path / "run"]
    command = [sys.executable, "-c", EIGHT, *map(str, arguments), "--model-axis", "2"]
    ended = subprocess.run(command, env=on_devices(8), capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    row = json.loads(ended.stdout)
    assert row["mesh"] == {"objective": 1, "data": 4, "model": 2}
    assert np.isfinite([list(figures.values()) for figures in row["figures"].values()]).all()
    assert (tmp_path / "run" / "params").is_dir()


@pytest.mark.slow
def test_a_dry_run_needs_neither_weights_nor_data(small, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    found = run("cifar10", "--dry-run", "--batch", 4, "--data-axis", 1)
    # The parameters, the original ones, two moments and the average, in float32.
    assert found["bytes_per_device"]["arguments"] >= 5 * 4 * found["parameters"]
    assert found["bytes_per_device"]["temporary"] > 0


def test_captions_are_numbered_with_the_empty_one_last(small, tmp_path):
    arguments = dict(zip(("weights", "forget", "retain"), folder_of(tmp_path)[1::2], strict=True))
    with np.load(tmp_path / "retain.npz") as found:
        tokens = found["tokens"].copy()
    tokens[0] = [18, *[19] * 6]
    np.savez(tmp_path / "retain.npz", latents=np.zeros((24, 8, 8, 4)), tokens=tokens)
    forget, retain, table = denoisers.captioned(**arguments)
    assert table.shape == (4, 7, 12)
    assert retain["labels"][0] == 3
    assert len({*forget["labels"], *retain["labels"][1:]}) == 3
    np.savez(tmp_path / "retain.npz", latents=np.zeros((24, 8, 8, 4)), tokens=tokens[:, :5])
    with pytest.raises(ValueError, match=r"retain: got .* expected latents and tokens \(n, 7\)"):
        denoisers.captioned(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10", "--topology", "v5e:4x4"], "it needs --dry-run"),
        (["cifar10", "--dry-run", "--method", "SCRUB"], "--method: got SCRUB, expected EUPMU"),
        (["stable-diffusion", "--weights", "folder"], "expected all three, or --dry-run"),
    ],
)
def test_incompatible_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        large.parsed(arguments)
    assert message in capsys.readouterr().err
