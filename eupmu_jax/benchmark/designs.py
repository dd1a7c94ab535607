"""The designs of the benchmark: what is compared, and at what size. Every row records its design and version."""

import hashlib
import json
from collections.abc import Collection
from typing import NamedTuple

from eupmu_jax.benchmark.problems import Recipe


class Case(NamedTuple):
    """A kind of forget set.

    Attributes:
      forget: As in `data.split`; `class:{}` takes the last digit of the seed as the class.
      steps: Steps of a method that passes both batches once forward and once backward. Other methods make at most as
        many, and no more passes in total.
      forget_batch, retain_batch: Examples in each step.
    """

    forget: str
    steps: int
    forget_batch: int
    retain_batch: int

    def of(self, seed: int) -> str:
        """The forget set for that seed."""
        return self.forget.format(seed % 10)


class Design(NamedTuple):
    """A benchmark, the same for every method.

    Attributes:
      data, model, size, recipe: See `problems.make`.
      cases: The forget sets.
      trials: Number of settings that every method is tuned with (`tuning.settings`), on the problem of `tuning_seed`.
      seeds: Seeds of the reported problems.
      held_out: Training examples that are taken out before anything else: methods take their target from them, and
        `tuning.blind_score` is measured on them.
      scores: Scores that each select a trial, see `tuning`; the selected trials are run on all seeds.
      shadow_size: Members and non-members that train a membership attack.
      relearning_steps: Steps of fine-tuning after unlearning, on `relearning_examples` of the forget set or on retain
        data.
      test_size: Use only this many examples of the test set, the first ones; all of them if None.
      augment: Whether training and unlearning see randomly cropped and flipped images.
      version: Raised with every change of code that affects figures.
    """

    data: str
    model: str
    size: int | None
    recipe: Recipe
    cases: tuple[Case, ...]
    trials: int
    seeds: tuple[int, ...]
    held_out: int
    tuning_seed: int = 100
    scores: tuple[str, ...] = ("blind", "gap")
    shadow_size: int = 2_000
    relearning_steps: int = 40
    relearning_examples: int = 500
    test_size: int | None = None
    augment: bool = False
    version: int = 1

    def digest(self, case: Case) -> str:
        """Hash of what the figures of one case depend on: all but the other cases and the seeds."""
        chosen = self._replace(seeds=(), cases=(case,))
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]


DESIGNS = {
    "fashion_mnist-cnn": Design(
        "fashion_mnist",
        "narrow-cnn",
        None,
        Recipe(50, 128, 1e-3),
        (
            Case("random:10%", 300, 64, 192),
            Case("random:50%", 250, 64, 192),
            Case("class:{}", 150, 64, 192),
        ),
        trials=6,
        seeds=(0, 1, 2),
        held_out=2_000,
        scores=("blind",),
        relearning_steps=20,
        version=2,
    ),
    "fashion_mnist-resnet": Design(
        "fashion_mnist",
        "resnet8-stride2",
        4_000,
        Recipe(40, 64, 1e-3),
        (
            Case("random:10%", 90, 16, 48),
            # One pass over the forget set.
            Case("random:50%", 125, 16, 48),
            Case("class:{}", 90, 16, 48),
        ),
        trials=6,
        seeds=(0, 1, 2, 3, 4),
        held_out=1_000,
        scores=("blind",),
        shadow_size=1_000,
        relearning_steps=12,
        test_size=3_000,
        version=2,
    ),
    "emoji-resnet": Design(
        "emoji_32",
        "resnet8-stride2",
        None,
        Recipe(40, 64, 1e-3),
        (Case("random:10%", 60, 16, 48), Case("class:{}", 60, 16, 48)),
        trials=6,
        seeds=(0, 1, 2, 3, 4),
        held_out=400,
        scores=("blind",),
        shadow_size=500,
        relearning_steps=12,
        relearning_examples=100,
    ),
    "cifar10-resnet18": Design(
        "cifar10",
        "resnet18",
        None,
        Recipe(180, 256, 1e-3),
        (
            Case("random:10%", 1_400, 64, 192),
            Case("random:30%", 1_100, 64, 192),
            Case("random:50%", 800, 64, 192),
            Case("class:{}", 700, 64, 192),
        ),
        trials=8,
        seeds=tuple(range(10)),
        held_out=2_000,
        shadow_size=10_000,
        augment=True,
        version=2,
    ),
    "digits": Design(
        "digits",
        "mlp",
        None,
        Recipe(50, 64, 1e-3),
        (Case("random:10%", 60, 16, 48), Case("random:50%", 40, 16, 48), Case("class:{}", 40, 16, 48)),
        trials=4,
        seeds=(0, 1),
        held_out=250,
        shadow_size=300,
        version=2,
    ),
}


def design(name: str) -> Design:
    """The named design; raises a `ValueError` that lists the known ones if there is none."""
    if name not in DESIGNS:
        raise ValueError(f"design: got {name!r}, expected one of {', '.join(DESIGNS)}")
    return DESIGNS[name]


def of_seeds(name: str, seeds: Collection[int] = ()) -> Design:
    """The design with these seeds, without repetitions; with its own seeds if none are given."""
    found = design(name)
    return found._replace(seeds=tuple(dict.fromkeys(seeds)) or found.seeds)
