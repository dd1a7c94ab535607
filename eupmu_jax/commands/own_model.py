"""Options of the commands for a model of one's own: unlearn, audit, report, verify, init, and the requests."""

import sys
from pathlib import Path

from eupmu_jax.commands._command_line import command_line
from eupmu_jax.service.user_file import own_errors

LEDGER, IDS = Path("eupmu_runs/requests.db"), Path("ids.txt")
NOT_MET, AUDIT_FAILED, INCONCLUSIVE = 3, 4, 5


def unlearn(
    file: Path,
    forget: Path | None = None,
    request: int | None = None,
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

    Exit code 3: the aim was missed, or the limit was not kept. The nearest point is saved and printed.

    Args:
        file: A Python file of yours that defines `task`, `params` and `data`, and perhaps `held_out` and `retrain`.
        forget: A text file of positions in the data, one in a line; default ids.txt.
        request: Number of a request in the ledger, in place of such a file; its state is set at the end.
        out: Folder of the run: checkpoints, the unlearned parameters, and what was reached.
        after: Folder of a finished run to go on from: its parameters, without what it forgot.
        config: A TOML file of the numbers that follow, as `eupmu init` writes it; by default mytask.toml beside
            mytask.py. Options of the command line take precedence.
        limit: Points by which the error on the retained examples may rise; default 1.0. Hundredths of an error that
            is no rate, such as a squared error; by default a tenth of the way from the forget error to its target.
        steps: Optimizer steps, part of what a run is; default 300.
        seed: Of the order of the examples; default 0.
        forget_batch: Examples to forget in each step; default 64.
        retain_batch: Examples to retain in each step; default 192.
        ledger: The SQLite file of all requests.
        retrain: Whether to train the exact answer too, by the file's retrain(positions); the audit compares with it.
    """
    from rich.console import Console

    from eupmu_jax.commands import unlearn as command
    from eupmu_jax.service import config as toml

    numbers = {"steps": steps, "seed": seed, "forget_batch": forget_batch, "retain_batch": retain_batch}
    config, console = config or toml.beside(file), Console()
    asked = toml.asked(config, limit=limit, **numbers)
    if config is not None:
        console.print(f"Numbers of the run: {config}", highlight=False, markup=False, soft_wrap=True)
    wanted = asked_for(forget, request, ledger)
    with own_errors(file):
        met = command.run(file, wanted, out, after, asked, command_line(), console, retrain)
    if not met:
        sys.exit(NOT_MET)


def asked_for(forget: Path | None, request: int | None, ledger: Path) -> "Path | tuple[Path, int]":
    """The file of positions, or the ledger and the number in it, of which there may be one.

    >>> str(asked_for(None, None, LEDGER)), asked_for(None, 2, Path("requests.db"))[1]
    ('ids.txt', 2)
    """
    if request is None:
        return forget or IDS
    if forget is not None:
        raise ValueError(f"forget: got {forget} beside request {request}, expected one of them")
    if request < 1:
        raise ValueError(f"request: got {request}, expected the number of a request in the ledger, 1 or more")
    return ledger, request


def audit(run: Path, file: Path) -> None:
    """Audits the parameters of a finished run: membership, relearning, rounding, and the error of each class.

    Exit codes: 0 passed, 4 failed, 5 inconclusive (the error is not above what it was, and the original model passes
    too; or there is neither `held_out` in the file nor a retrained model). A remark says where the original model
    passes the same tests, as it may with few examples.

    Args:
        run: Folder of the run.
        file: The Python file that it was made of. Nothing that the folder says is executed.
    """
    from rich.console import Console

    from eupmu_jax.service import audit, folder, records

    with own_errors(file):
        found = audit.run(file, run)
    said = audit.said(found)
    if folder.is_of_other_code(file, records.read(run / "reached.json", "reached")):
        said += f"\nWarning: {file} has changed since the run; these are the figures of its task as it is now."
    Console().print(said, highlight=False, markup=False, soft_wrap=True)
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
        report: The report.json in the folder of the run, or that folder.
        file: The Python file that the run was made of. Nothing that the folder says is executed.
    """
    from eupmu_jax.service.report import verify

    with own_errors(file):
        wrong = verify(report, file)
    if wrong:
        print("\n".join(wrong))
        sys.exit(AUDIT_FAILED)
    print(
        "All hashes and all figures of the audit are as reported. What the steps showed and took, the device and the "
        "command cannot be computed again. The page was not looked at: `eupmu report` makes it again from the report."
    )


def init(file: Path = Path("mytask.py")) -> None:
    """Writes a commented file for a classifier of your own, to be filled in, and a TOML file of numbers beside it.

    Args:
        file: File to write; the command refuses if it or its TOML file exists already.
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
