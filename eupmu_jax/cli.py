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


def main() -> None:
    """Runs `eupmu`; exits with 2 and one line on stderr where the input is at fault."""
    try:
        import tyro

        import eupmu_jax.demo  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; the command needs: pip install 'eupmu-jax[experiments]'")
    app = tyro.extras.SubcommandApp()
    app.command(demo)
    try:
        app.cli(prog="eupmu", description="Machine unlearning in JAX.")
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit("eupmu: interrupted; trained models are kept, and the same command will use them")


def _fail(message):
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
