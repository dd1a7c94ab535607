"""Logits and running statistics of ResNet-8, ResNet-18, VGG-16 and a ViT, written down once more in PyTorch.

Command: python tests/models/make_golden.py (needs numpy and torch, which nothing else here does; a minute)
Result: golden_<model>.json next to this file, which test_golden.py compares with the models of this package.
"""

import itertools
import json
import zlib
from pathlib import Path

import numpy as np

BATCH = 4
VIT = {"image_size": 28, "patch_size": 4, "width": 48, "layers": 2, "heads": 3}
CHANNELS = {"resnet8": 1, "resnet18": 3, "vgg16": 3, "vgg16_28": 1, "vit": 1}


def seeded(name, shape):
    """The parameter or statistic `name`, of a PyTorch shape, by a rule that both sides share."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kind = name.rpartition(".")[2]
    if kind == "running_var" or (kind == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = np.sqrt(2 / np.prod(shape[1:])) if kind == "weight" else 0.1
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def images(model):
    """A batch, channels last."""
    size = 28 if model in ("vgg16_28", "vit") else 32
    return np.random.default_rng(0).standard_normal((BATCH, size, size, CHANNELS[model])).astype(np.float32)


def build(name):
    """The model in PyTorch; submodules are named as in this package, up to the lists of `Sequential`."""
    import torch
    from torch import nn

    def conv(inputs, outputs, size=3, stride=1, bias=False):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride, projection):
            super().__init__()
            self.stride, self.extra = stride, outputs - inputs
            self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
            self.conv2, self.norm2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
            self.projects = projection and inputs != outputs
            if self.projects:
                self.conv3, self.norm3 = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

        def forward(self, x):
            y = self.norm2(self.conv2(nn.functional.relu(self.norm1(self.conv1(x)))))
            if self.projects:
                return nn.functional.relu(y + self.norm3(self.conv3(x)))
            return nn.functional.relu(
                y + nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
            )

    class ResNet(nn.Module):
        def __init__(self, channels, widths, depth, projection):
            super().__init__()
            self.conv, self.norm = conv(channels, widths[0]), nn.BatchNorm2d(widths[0])
            sizes = [widths[0], *(width for width in widths for _ in range(depth))]
            pairs = itertools.pairwise(sizes)
            self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2, projection) for a, b in pairs))
            self.head = nn.Linear(widths[-1], 10)

        def forward(self, x):
            return self.head(self.blocks(nn.functional.relu(self.norm(self.conv(x)))).mean((2, 3)))

    class VGG(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
            widths = [channels, *(width for width, depth in self.stages for _ in range(depth))]
            self.convs = nn.ModuleList(conv(a, b, bias=True) for a, b in itertools.pairwise(widths))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
            self.head = nn.Linear(512, 10)

        def forward(self, x):
            last = np.cumsum([depth for _, depth in self.stages])
            for i, (convolve, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
                x = nn.functional.relu(norm(convolve(x)))
                x = nn.functional.max_pool2d(x, 2, ceil_mode=True) if i in last else x
            return self.head(x.flatten(1))

    class ViTBlock(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.attention = nn.ModuleDict({part: nn.Linear(width, width) for part in ("query", "key", "value", "out")})
            self.up, self.down, self.heads = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), heads

        def forward(self, x):
            y = self.attention_norm(x)
            split = lambda part: self.attention[part](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(split("query"), split("key"), split("value"))
            x = x + self.attention["out"](y.transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    class ViT(nn.Module):
        def __init__(self, channels, image_size, patch_size, width, layers, heads):
            super().__init__()
            # The patch embedding as the convolution of the paper's code.
            self.embed = nn.Conv2d(channels, width, patch_size, patch_size)
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
            self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 10)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return {
        "resnet8": lambda channels: ResNet(channels, (16, 32, 64), 1, False),
        "resnet18": lambda channels: ResNet(channels, (64, 128, 256, 512), 2, True),
        "vgg16": VGG,
        "vgg16_28": VGG,
        "vit": lambda channels: ViT(channels, **VIT),
    }[name](CHANNELS[name])


def main():
    """Writes the files."""
    import torch

    for name in CHANNELS:
        model = build(name)
        state = model.state_dict()
        for key, value in state.items():
            if value.is_floating_point():
                value.copy_(torch.from_numpy(seeded(key, tuple(value.shape))))
        x = torch.from_numpy(images(name).transpose(0, 3, 1, 2).copy())
        norms = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
        counts = {}
        for key, module in norms.items():
            module.register_forward_hook(
                lambda m, x, y, key=key, counts=counts: counts.update({key: y.numel() // y.shape[1]})
            )
        with torch.no_grad():
            evaluated = model.eval()(x)
            trained = model.train()(x)
        # Of every layer: values per channel, and the first updated statistics.
        statistics = {
            key: {
                "count": counts[key],
                "mean": module.running_mean[:4].tolist(),
                "var": module.running_var[:4].tolist(),
            }
            for key, module in norms.items()
        }
        parameters = sum(parameter.numel() for parameter in model.parameters())
        golden = {"torch": torch.__version__, "parameters": parameters}
        golden |= {"eval": evaluated.tolist(), "train": trained.tolist(), "statistics": statistics}
        Path(__file__).with_name(f"golden_{name}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
