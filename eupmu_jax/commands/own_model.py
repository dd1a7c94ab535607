"""The commands for a model of your own: unlearn, audit, report, verify, init and request."""

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
    """Unlearns some of your own data in your own model; rerun the same command to resume.

    Exit code 3: the target was missed or the limit was not kept. The nearest point is saved and printed.

    Args:
        file: Your Python file, which defines `task`, `params` and `data`, and optionally `held_out` and `retrain`.
        forget: A text file of positions in the data, one per line; default ids.txt.
        request: Number of a request in the ledger, instead of such a file; its state is updated at the end.
        out: Folder of the run: checkpoints, the unlearned parameters and the result.
        after: Folder of a finished run to start from: its parameters, without the data that it forgot. The limit counts
            from there, so the rises of successive runs add up.
        config: A TOML file with any of limit, steps, seed, forget_batch and retain_batch, as `eupmu init` writes it; by
            default mytask.toml beside mytask.py. Options on the command line take precedence.
        limit: Points by which the error on the retained examples may rise; default 1.0. For an error that is not a
            rate, such as a squared error: hundredths of its unit; by default a tenth of the distance from the forget
            error to its target.
        steps: Optimizer steps, fixed for a run; default 300.
        seed: Seed of the order of the examples; default 0.
        forget_batch: Examples to forget in each step; default 64.
        retain_batch: Examples to retain in each step; default 192.
        ledger: The SQLite file of all requests.
        retrain: Whether to train the exact answer too, with the file's retrain(positions); the audit compares with it.
    """
    from rich.console import Console

    from eupmu_jax.commands import unlearn as command
    from eupmu_jax.service import config as toml

    numbers = {"steps": steps, "seed": seed, "forget_batch": forget_batch, "retain_batch": retain_batch}
    config, console = config or toml.beside(file), Console()
    asked = toml.asked(config, limit=limit, **numbers)
    if config is not None:
        console.print(f"Options of the run: {config}", highlight=False, markup=False, soft_wrap=True)
    wanted = asked_for(forget, request, ledger)
    with own_errors(file):
        met = command.run(file, wanted, out, after, asked, command_line(), console, retrain)
    if not met:
        sys.exit(NOT_MET)


def asked_for(forget: Path | None, request: int | None, ledger: Path) -> "Path | tuple[Path, int]":
    """The file of positions, or the ledger and a request's number; raises `ValueError` if both are given.

    >>> str(asked_for(None, None, LEDGER)), asked_for(None, 2, Path("requests.db"))[1]
    ('ids.txt', 2)
    """
    if request is None:
        return forget or IDS
    if forget is not None:
        raise ValueError(f"forget: got {forget} and request {request}, expected one of them")
    if request < 1:
        raise ValueError(f"request: got {request}, expected the number of a request in the ledger, 1 or more")
    return ledger, request


def audit(run: Path, file: Path) -> None:
    """Audits the parameters of a finished run: membership, relearning, rounding, and the error of each class.

    Exit codes: 0 passed, 4 failed, 5 inconclusive (the error did not rise and the original model passes too, or there
    is neither `held_out` in the file nor a retrained model). A remark says if the original model passes the same tests,
    as it may with few examples.

    Args:
        run: Folder of the run.
        file: The Python file of the run. Nothing in the folder is executed.
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
    """Checks a report: recomputes all hashes, repeats the audit from the saved parameters, and lists what differs.

    Exit code 4 if anything differs.

    Args:
        report: The report.json in the folder of the run, or that folder.
        file: The Python file of the run. Nothing in the folder is executed.
    """
    from eupmu_jax.service._words import printable
    from eupmu_jax.service.report import verify

    with own_errors(file):
        wrong = verify(report, file)
    if wrong:
        # They quote the report, which may want to look verified.
        print("\n".join(printable(" ".join(line.split("\n"))) for line in wrong))
        sys.exit(AUDIT_FAILED)
    print(
        "All hashes and all figures of the audit are as reported. Accuracies after relearning may differ by 5 points; "
        "TPR and epsilon are only checked with the extra `audit`. Not checked: the run's own figures and history, its "
        "cost, versions, device and command, and the page, which `eupmu report` makes anew from the records."
    )


def init(file: Path = Path("mytask.py")) -> None:
    """Writes a commented template for a classifier of your own, and a TOML file of run options beside it.

    Args:
        file: File to write; the command fails if it or its TOML file already exists.
    """
    from eupmu_jax.commands import init

    init.write(file)
    numbers = file.with_suffix(".toml")
    print(f"{file}, {numbers}: change what is marked CHANGE, then `eupmu unlearn {file} --forget ids.txt --out RUN`")


def add(file: Path, ids: Path, reason: str = "", ledger: Path = LEDGER) -> None:
    """Adds a request to delete positions in your data, or finds the same request.

    Args:
        file: Your Python file, which defines `data`: a pytree of arrays with one leading axis, or anything with
            len(data) and data[positions].
        ids: A text file with one position per line.
        reason: The reason, in your own words.
        ledger: The SQLite file of all requests; created if it does not exist.
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
        number: Number of the request.
        ledger: The SQLite file of all requests.
    """
    from rich.console import Console

    from eupmu_jax.commands import request

    request.show_one(number, ledger, Console())
