"""The command `eupmu`."""

import sys
from pathlib import Path

BAD_INPUT = 2


def demo(data: str = "digits", forget: str = "class:3", seed: int = 0, out: Path = Path("eupmu_runs/demo")) -> None:
    """Makes a real model forget real data: original, retrained and unlearned models, side by side.

    Args:
        data: digits (ships with scikit-learn) or fashion_mnist (through tensorflow-datasets).
        forget: What to forget: a whole class, class:N, or a random share of the training set, random:10%.
        seed: Seed of the split, the models and the methods.
        out: Folder for rows.jsonl, report.html, the checkpoints and the cache of trained models.
    """
    from rich.console import Console

    from eupmu_jax import demo

    demo.run(data, forget, seed, out, Console())


def plan(
    topology: str = "v5e:16x16",
    model: str = "7b",
    step: str = "explicit",
    data: int = 0,
    tensor: int = 4,
    batch: int = 64,
    sequence: int = 1024,
    out: Path | None = None,
) -> None:
    """Compiles a step for devices that need not be there: memory, collectives, operations, roofline.

    Args:
        topology: A TPU slice, v5e:16x16, v5p:8x8x8, v6e:16x16 (needs the extra tpu), or cpu:8.
        model: Size of a decoder: tiny, 135m, 7b or 70b.
        step: plain, explicit, explicit-bf16, explicit-microbatches, two-pass or implicit.
        data: Devices along which the batch is split; 0 takes all that tensor leaves.
        tensor: Devices along which heads and features are split.
        batch: Sequences of the forget batch, and of the retain batch.
        sequence: Tokens of a sequence.
        out: JSON lines file to append the figures to.
    """
    from rich.console import Console

    from eupmu_jax import plan

    console = Console()
    with console.status(f"compiling for {topology}"):
        row = plan.make(topology, model, step, data=data, tensor=tensor, batch=batch, sequence=sequence)
    plan.show(row, out, console)


def main() -> None:
    """Runs `eupmu`; exits with 2 and one line on stderr where the input is at fault."""
    try:
        import tyro

        import eupmu_jax.demo  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; the command needs: pip install 'eupmu-jax[experiments]'")
    app = tyro.extras.SubcommandApp()
    app.command(demo)
    app.command(plan)
    try:
        app.cli(prog="eupmu", description="Machine unlearning in JAX.")
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit("eupmu: interrupted; trained models are kept, and the same command will use them")


def _fail(message):
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
