"""The command `eupmu`."""

import shlex
import sys
from pathlib import Path
from typing import Literal

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

    from eupmu_jax.commands import demo

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

    from eupmu_jax.commands import plan

    console = Console()
    with console.status(f"compiling for {topology}"):
        row = plan.make(topology, model, step, data=data, tensor=tensor, batch=batch, sequence=sequence)
    plan.show(row, out, console)


def methods() -> None:
    """Lists every method with its paper, its cost in forward (F) and backward (B) passes, and what it needs."""
    from rich.console import Console

    from eupmu_jax.benchmark import tables

    tables.show_methods(Console())


def benchmark(
    name: Literal["classification"],
    design: str = "fashion_mnist-cnn",
    forget: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    out: Path = Path("eupmu_runs/benchmark"),
    workers: int = 0,
    cluster: str = "",
    show: Literal["terminal", "markdown", "latex"] = "terminal",
    run: bool = True,
) -> None:
    """Makes the rows that are missing, and prints the table of all methods from rows.

    Args:
        name: The benchmark.
        design: What is compared, and at what size: fashion_mnist-cnn, fashion_mnist-resnet, cifar10-resnet18, digits.
        forget: Forget sets, such as random:10%; all of the design if none is given.
        methods: Names as eupmu methods lists them; all if none is given.
        seeds: All of the design if none is given.
        out: Folder of rows.jsonl, figures and the cache of trained models.
        workers: Processes; 0 is one for each core, or one alone for an accelerator.
        cluster: Address of a dask scheduler whose workers make the rows (needs the extra cluster), tcp://host:8786.
        show: Form of the table.
        run: Whether to make missing rows; the table alone needs neither data nor models.
    """
    from rich.console import Console

    from eupmu_jax.benchmark import figures, runner, tables

    console = Console()
    command = shlex.join(["eupmu", *sys.argv[1:]])
    chosen = list(forget), list(methods), list(seeds)
    runner.jobs_of(design, *chosen)  # raises what is wrong with them
    if run:
        runner.run(design, *chosen, out, command, console, workers=workers, cluster=cluster)
    tables.show(design, out, show, console, forget)
    figures.draw(design, out)


def main() -> None:
    """Runs `eupmu`; exits with 2 and one line on stderr where the input is at fault."""
    try:
        import tyro

        import eupmu_jax.commands.demo  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; the command needs: pip install 'eupmu-jax[experiments]'")
    app = tyro.extras.SubcommandApp()
    app.command(demo)
    app.command(plan)
    app.command(methods)
    app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(benchmark))
    try:
        app.cli(prog="eupmu", description="Machine unlearning in JAX.")
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except ChildProcessError as error:
        sys.exit(f"eupmu: {error}")
    except KeyboardInterrupt:
        sys.exit("eupmu: interrupted; trained models are kept, and the same command will use them")


def _fail(message):
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
