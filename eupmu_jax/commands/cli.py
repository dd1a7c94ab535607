"""The command `eupmu`."""

import contextlib
import io
import multiprocessing
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from eupmu_jax.service.user_file import UserFileError, own_errors

LEDGER = Path("eupmu_runs/requests.db")
BAD_INPUT, NOT_MET, AUDIT_FAILED, INCONCLUSIVE = 2, 3, 4, 5


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
    file: Path | None = None,
    forget: Path = Path("ids.txt"),
    request: int = 0,
    config: Path | None = None,
    ledger: Path = LEDGER,
    epochs: int = 0,
    topology: str = "v5e:16x16",
    model: str = "7b",
    step: str = "explicit",
    data: int = 0,
    tensor: int = 4,
    batch: int = 64,
    sequence: int = 1024,
    out: Path | None = None,
) -> None:
    """Says what unlearning would take, and changes nothing: of a file of yours, or of a decoder on many devices.

    With a file: memory of a step as compiled, passes, earlier requests of the same examples, and what an audit can
    compare with. Without: memory, collectives, operations and roofline of a step on devices that need not be there.

    Args:
        file: A Python file of yours, as `eupmu unlearn` takes it.
        forget: With a file: a text file of positions in its data, one in a line.
        request: With a file: number of a request in the ledger, in place of positions.
        config: With a file: a TOML file of the numbers of a run, as `eupmu init` writes it.
        ledger: With a file: the SQLite file of all requests.
        epochs: With a file: passes over the data that training took, for the share of retraining.
        topology: A TPU slice, v5e:16x16, v5p:8x8x8, v6e:16x16 (needs the extra tpu), or cpu:8.
        model: Size of a decoder: tiny, 135m, 7b or 70b.
        step: plain, explicit, explicit-bf16, explicit-microbatches, two-pass or implicit.
        data: Devices along which the batch is split; 0 takes all that tensor leaves.
        tensor: Devices along which heads and features are split.
        batch: Sequences of the forget batch, and of the retain batch.
        sequence: Tokens of a sequence.
        out: JSON lines file to append the figures of a decoder to.
    """
    from rich.console import Console

    console = Console()
    if file is not None:
        from eupmu_jax.commands import unlearn as command
        from eupmu_jax.service import config as toml

        with own_errors(file):
            command.plan(file, (ledger, request) if request else forget, toml.asked(config), ledger, epochs, console)
        return

    from eupmu_jax.commands import plan

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
        design: What is compared, and at what size: fashion_mnist-cnn, fashion_mnist-resnet, emoji-resnet,
            cifar10-resnet18, digits.
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


def unlearn(
    file: Path,
    forget: Path = Path("ids.txt"),
    request: int = 0,
    out: Path = Path("eupmu_runs/unlearn"),
    after: Path | None = None,
    config: Path | None = None,
    limit: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    forget_batch: int | None = None,
    retain_batch: int | None = None,
    ledger: Path = LEDGER,
    retrain: bool = False,
) -> None:
    """Unlearns some of your own data in your own model; the same command goes on where it was stopped.

    Exit code 3: the error of unseen data could not be reached within the limit. The nearest point is kept and printed.

    Args:
        file: A Python file of yours that defines `task`, `params` and `data`, and perhaps `held_out` and `retrain`.
        forget: A text file of positions in the data, one in a line.
        request: Number of a request in the ledger, in place of such a file; its state is set at the end.
        out: Folder of the run: checkpoints, the unlearned parameters, and what was reached.
        after: Folder of a finished run to go on from: its parameters, without what it forgot.
        config: A TOML file of the numbers that follow, as `eupmu init` writes it; the command line goes before it.
        limit: Points that the error on the retained examples may rise by; 1.0 if nothing says.
        steps: Optimizer steps; 300.
        seed: Of the order of the examples; 0.
        forget_batch: Examples to forget in each step; 64.
        retain_batch: Examples to retain in each step; 192.
        ledger: The SQLite file of all requests.
        retrain: Whether to train the exact answer too, by the file's retrain(positions); the audit compares with it.
    """
    from rich.console import Console

    from eupmu_jax.commands import unlearn as command
    from eupmu_jax.service import config as toml

    numbers = {"steps": steps, "seed": seed, "forget_batch": forget_batch, "retain_batch": retain_batch}
    asked = toml.asked(config, limit=limit, **numbers)
    wanted = (ledger, request) if request else forget
    with own_errors(file):
        met = command.run(file, wanted, out, after, asked, shlex.join(["eupmu", *sys.argv[1:]]), Console(), retrain)
    if not met:
        sys.exit(NOT_MET)


def audit(run: Path, file: Path) -> None:
    """Audits the parameters of a finished run: membership, relearning, rounding, and the error of each class.

    Exit codes: 0 passed, 4 failed, 5 inconclusive (the file has no `held_out`, and the run no retrained model).

    Args:
        run: Folder of the run.
        file: The Python file that it was made of. Nothing that the folder says is executed.
    """
    from rich.console import Console

    from eupmu_jax.service import audit

    with own_errors(file):
        found = audit.run(file, run)
    Console().print(audit.said(found), highlight=False, markup=False, soft_wrap=True)
    sys.exit({audit.PASSED: 0, audit.FAILED: AUDIT_FAILED, audit.INCONCLUSIVE: INCONCLUSIVE}[found["verdict"]])


def report(run: Path) -> None:
    """Writes the report of an audited run: report.json, and report.html, one self-contained page.

    Args:
        run: Folder of the run.
    """
    from eupmu_jax.commands import report

    print(report.run(run))


def verify(report: Path, file: Path) -> None:
    """Checks a report: all hashes again, and the audit again from the saved parameters; says what differs.

    Exit code 4 if anything does.

    Args:
        report: The report.json in the folder of the run.
        file: The Python file that the run was made of. Nothing that the folder says is executed.
    """
    from eupmu_jax.service.report import verify

    with own_errors(file):
        wrong = verify(report, file)
    if wrong:
        print("\n".join(wrong))
        sys.exit(AUDIT_FAILED)
    print("All hashes and figures are as reported.")


def init(file: Path = Path("mytask.py")) -> None:
    """Writes a commented file for a classifier of your own, to be filled in, and a TOML file of numbers beside it.

    Args:
        file: Where; files that are there already are left alone.
    """
    from eupmu_jax.commands import init

    init.write(file)
    numbers = file.with_suffix(".toml")
    print(f"{file}, {numbers}: change what is marked CHANGE, then `eupmu unlearn {file} --forget ids.txt --out RUN`")


def add(file: Path, ids: Path, reason: str = "", ledger: Path = LEDGER) -> None:
    """Adds a request, or finds the same one: positions in the data of a file of yours, to be deleted.

    Args:
        file: A Python file of yours that defines `data`: a tree of arrays with one leading axis, or anything with
            len(data) and data[positions].
        ids: A text file with one position in a line.
        reason: In your words.
        ledger: The SQLite file of all requests; made if it is not there.
    """
    from rich.console import Console

    from eupmu_jax.commands import request

    request.add(file, ids, reason, ledger, Console())


def list_requests(ledger: Path = LEDGER) -> None:
    """Lists all requests.

    Args:
        ledger: The SQLite file of all requests.
    """
    from rich.console import Console

    from eupmu_jax.commands import request

    request.show_all(ledger, Console())


def show(number: int, ledger: Path = LEDGER) -> None:
    """Shows a request with its positions.

    Args:
        number: Of the request.
        ledger: The SQLite file of all requests.
    """
    from rich.console import Console

    from eupmu_jax.commands import request

    request.show_one(number, ledger, Console())


def main() -> None:
    """Runs `eupmu`; exits with 2 and one line on stderr where the input is at fault, with 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows ASCII alone shows question marks.
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        import tyro

        # Tyro is no dependency of the library, so no annotation above can name it.
        own_file = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")]
        plan.__annotations__["file"] = own_file
        app = tyro.extras.SubcommandApp()
        app.command(demo)
        app.command(plan)
        app.command(methods)
        app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(benchmark))
        app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(unlearn))
        app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(audit))
        app.command(init)
        app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(report))
        app.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(verify))
        requests = tyro.extras.SubcommandApp()
        requests.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(add))
        requests.command(name="list")(list_requests)
        requests.command(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(show))
        app.command(requests, name="request", help="Keeps a ledger of what is to be deleted.")
        app.cli(prog="eupmu", description="Machine unlearning in JAX.")
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; the command needs: pip install 'eupmu-jax[experiments]'")
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except ChildProcessError as error:
        sys.exit(f"eupmu: {error}")
    except InterruptedError as error:
        _end(str(error), 143)
    except OSError as error:
        # No space left, a folder that cannot be written, a file in the place of one.
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except UserFileError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms is None or "backend" not in str(error):
            raise
        _fail(f"JAX_PLATFORMS: got {platforms!r}, which JAX cannot start here; expected cpu, or none")


def _interrupted(*_):
    _end("interrupted; what was finished is kept, and the same command goes on from it", 130)


def _terminated(*_):
    _end("terminated; what was finished is kept, and the same command goes on from it", 143)


def _end(message, code):
    # At once, and not by an exception: raised in a callback of the garbage collector, it would be dropped.
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    with contextlib.suppress(RuntimeError):  # the signal may have come within a write
        print(show_cursor, end="", flush=True)
        print(f"eupmu: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    # Not by way of the interpreter's end, which XLA's threads at work may not survive.
    os._exit(code)


def _fail(message):
    print(f"eupmu: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
