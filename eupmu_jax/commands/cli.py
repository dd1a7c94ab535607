"""The command `eupmu`."""

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from eupmu_jax.commands._command_line import command_line
from eupmu_jax.commands._ends import BAD_INPUT, end, fail, on_signals, quiet
from eupmu_jax.commands.own_model import (
    LEDGER,
    add,
    asked_for,
    audit,
    init,
    list_requests,
    report,
    show,
    unlearn,
    verify,
)
from eupmu_jax.service.user_file import UserFileError, own_errors

# Options of `plan` that need a user's file, and those that go with one or without.
OF_FILE = ("forget", "request", "config", "ledger", "epochs", "after")
OF_BOTH = ("topology", "data", "tensor")
CONSTANTS = "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS"


def demo(data: str = "digits", forget: str | None = None, seed: int = 0, out: Path | None = None) -> None:
    """Makes a real model forget real data: original, retrained and unlearned models, side by side.

    Args:
        data: digits (ships with scikit-learn); fashion_mnist (from Debian's package or EUPMU_FASHION_MNIST);
            digits-diffusion, where a diffusion model of digits forgets a class; or persons, where a language model
            that answers questions about persons forgets some of them (needs the extra language).
        forget: What to forget: a whole class, class:N (default class:3), or a random share of the training set,
            random:10%. With persons, the seed decides who is forgotten.
        seed: Seed of the split, the models and the methods.
        out: Folder for rows.jsonl, report.html, the checkpoints and the cache of trained models; eupmu_runs/demo,
            eupmu_runs/demo-diffusion or eupmu_runs/demo-persons.
    """
    from rich.console import Console

    from eupmu_jax.commands import demo, demo_diffusion, demo_persons

    if data == demo_persons.NAME:
        if forget is not None:
            raise ValueError(f"forget: got {forget!r}, expected none, as the seed draws the persons")
        _pass_constants()
        demo_persons.run(seed, out or Path("eupmu_runs/demo-persons"), Console())
    elif data == demo_diffusion.NAME:
        demo_diffusion.run(forget or "class:3", seed, out or Path("eupmu_runs/demo-diffusion"), Console())
    else:
        demo.run(data, forget or "class:3", seed, out or Path("eupmu_runs/demo"), Console())


def plan(
    file: Path | None = None,
    forget: Path | None = None,
    request: int | None = None,
    config: Path | None = None,
    ledger: Path = LEDGER,
    epochs: int = 0,
    after: Path | None = None,
    topology: str | None = None,
    model: str = "7b",
    step: str = "explicit",
    data: int = 0,
    tensor: int | None = None,
    batch: int = 64,
    sequence: int = 1024,
    adapters: int = 0,
    out: Path | None = None,
) -> None:
    """Estimates what unlearning your own data takes, or a step of a large model on many devices; changes nothing.

    With a file: memory of the compiled step, passes, earlier requests for the same examples, and what an audit can
    compare with. Without: memory, collectives, operations and roofline of a step of a standard model. Both can be
    compiled for devices that you need not have.

    Args:
        file: Your Python file, as for `eupmu unlearn`.
        forget: With a file: a text file of positions in its data, one per line; default ids.txt.
        request: With a file: number of a request in the ledger, instead of positions.
        config: With a file: a TOML file with the options of a run; by default mytask.toml beside mytask.py.
        ledger: With a file: the SQLite file of all requests.
        epochs: With a file: epochs that training took, to give the cost as a share of retraining.
        after: With a file: folder of the run that this one would start from.
        topology: A TPU slice such as v5e:16x16, v5p:8x8x8 or v6e:16x16 (needs the extra tpu), or cpu:8. Default: the
            mesh of the file, or v5e:16x16 without a file.
        model: Size of a decoder: tiny, 135m, 1b, 7b, 8b or 70b; or ddpm-cifar10, or stable-diffusion (its U-Net).
        step: plain, explicit, explicit-bf16, explicit-microbatches, two-pass or implicit.
        data: Devices over which the batch is split; 0 uses all that --tensor leaves.
        tensor: Devices over which heads and features are split; default 4, or 1 with a file.
        batch: Sequences or images in the forget batch, and in the retain batch.
        sequence: Tokens per sequence, for a decoder.
        adapters: Rank of low-rank adapters that are trained instead of a decoder's parameters; 0 for none.
        out: JSON Lines file to which the figures of the step are appended.
    """
    defaults = inspect.signature(plan).parameters
    given = [name for name, value in locals().items() if name in defaults and value != defaults[name].default]
    from rich.console import Console

    console = Console()
    others = [name for name in given if name not in ("file", *OF_BOTH) and (name in OF_FILE) != (file is not None)]
    if others and file is None:
        raise ValueError(f"file: got none with {', '.join(others)}; expected your Python file, which these need")
    if others:
        raise ValueError(
            f"{', '.join(others)}: got together with {file}; expected no file, as these plan a step of a standard model"
        )
    if file is not None:
        from eupmu_jax.commands import unlearn as command
        from eupmu_jax.service import config as toml
        from eupmu_jax.training.mesh.topology import mesh_of

        if topology is None and (parts := [name for name in OF_BOTH if name in given]):
            raise ValueError(
                f"topology: got none with {', '.join(parts)}; expected devices to split the file's model over"
            )
        # Before the file starts JAX, which fixes the number of CPU devices.
        there = None if topology is None else mesh_of(topology, data, 1 if tensor is None else tensor)
        asked = asked_for(forget, request, ledger), toml.asked(config or toml.beside(file))
        with own_errors(file):
            command.plan(file, *asked, ledger, epochs, after, there, console)
        return

    from eupmu_jax.commands import plan as of_step

    topology, tensor = "v5e:16x16" if topology is None else topology, 4 if tensor is None else tensor
    with console.status(f"compiling for {topology}"):
        row = of_step.make(
            topology, model, step, data=data, tensor=tensor, batch=batch, sequence=sequence, adapters=adapters
        )
    of_step.show(row, out, console)


def methods() -> None:
    """Lists every method with its paper, its cost in forward (F) and backward (B) passes, and its requirements."""
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
    """Computes the rows that are missing, and prints the table of all methods.

    Args:
        name: The benchmark.
        design: What is compared, and at what size: fashion_mnist-cnn, fashion_mnist-resnet, emoji-resnet,
            cifar10-resnet18, digits.
        forget: Forget sets, such as random:10%; by default all of the design.
        methods: Names as eupmu methods lists them; by default all.
        seeds: By default all of the design.
        out: Folder for rows.jsonl, figures and the cache of trained models.
        workers: Number of processes; 0 means one per core, or a single one on an accelerator.
        cluster: Address of a dask scheduler, such as tcp://host:8786, whose workers compute the rows (needs the extra
            cluster).
        show: Format of the table.
        run: Whether to compute missing rows; the table alone needs neither data nor models.
    """
    from rich.console import Console

    from eupmu_jax.benchmark import figures, runner, tables

    console = Console()
    command = command_line()
    chosen = list(forget), list(methods), list(seeds)
    runner.jobs_of(design, *chosen)  # raises if they are invalid
    if run:
        runner.run(design, *chosen, out, command, console, workers=workers, cluster=cluster)
    tables.show(design, out, show, console, forget, seeds, methods)
    figures.draw(design, out, seeds=seeds)


# Arguments that the usage line shows by name.
PATHS = {unlearn: ("file",), audit: ("run", "file"), report: ("run",), verify: ("report", "file"), add: ("file", "ids")}


def main() -> None:
    """Runs `eupmu`; exits with 2 and one line on stderr on invalid input, with 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An ASCII-only terminal shows question marks instead of failing.
            stream.reconfigure(errors="replace")
    with on_signals(), quiet():
        _run()


def _local(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which first refuses URLs among its paths: `pathlib` takes gs://bucket for a folder named `gs:`."""

    @functools.wraps(command)
    def checked(*args, **options):
        from eupmu_jax.training._faults import check_local

        for name, value in inspect.signature(command).bind(*args, **options).arguments.items():
            if isinstance(value, Path):
                check_local(name, value)
        command(*args, **options)

    return checked


def _run():
    try:
        import tyro

        # Tyro is an optional dependency, so the annotations above cannot use it.
        own_file = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")]
        plan.__annotations__["file"] = own_file
        for command, paths in PATHS.items():
            for name in paths:
                command.__annotations__[name] = Annotated[Path, tyro.conf.arg(metavar=name.upper())]
        app, requests = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
        for command in (demo, plan, methods, benchmark, unlearn, audit, init, report, verify):
            app.command(_local(command))
        for command, name in ((add, "add"), (list_requests, "list"), (show, "show")):
            requests.command(name=name)(_local(command))
        app.command(requests, name="request", help="Keeps a ledger of deletion requests.")
        required = (tyro.conf.PositionalRequiredArgs,)
        app.cli(prog="eupmu", description="Machine unlearning in JAX.", config=required)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; the command needs: pip install 'eupmu-jax[experiments]'")
    except (ValueError, FileNotFoundError, ImportError) as error:
        # The code that needs a missing extra names it.
        fail(str(error))
    except ChildProcessError as error:
        sys.exit(f"eupmu: {error}")
    except InterruptedError as error:
        end(str(error), 143)
    except OSError as error:
        # No space left, an unwritable folder, or a file where a folder should be.
        fail(f"{error.filename}: {error.strerror or error}" if error.filename else str(error))
    except UserFileError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms is None or "backend" not in str(error):
            raise
        fail(f"JAX_PLATFORMS: got {platforms!r}, which JAX cannot start here; expected cpu, or none")


def _pass_constants():
    """Makes JAX pass pretrained weights to its programs; as constants they would cost minutes of XLA's time."""
    if CONSTANTS not in os.environ:
        # JAX reads the variable on import, so the process has to start again.
        os.execve(sys.executable, [sys.executable, "-m", "eupmu_jax", *sys.argv[1:]], os.environ | {CONSTANTS: "1"})
