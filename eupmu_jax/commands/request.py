"""`eupmu request add`, `list` and `show`: a durable ledger of deletion requests."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eupmu_jax.service import ledger, read_ids, user_file
from eupmu_jax.service._words import printable
from eupmu_jax.tasks import as_examples

# Positions that `show` prints on a terminal; it counts the rest.
SHOWN = 20


def add(file: Path, ids: Path, reason: str, path: Path, console: Console) -> None:
    """Adds a request for the positions in `ids` of the data that a user's file defines; see `ledger.add`."""
    data = user_file.load(file, ("data",))["data"]
    positions = read_ids(ids, len(as_examples("data", data)))
    digest = user_file.data_digest(data)
    with ledger.opened(path) as connection:
        request, is_new = ledger.add(connection, digest, positions, reason)
    said = "added" if is_new else f"exists already, made at {request.made}, {request.state}"
    if not is_new and reason not in ("", request.reason):
        said += f"; its reason stays {request.reason!r}"
    line = f"Request {request.number}, {request.examples:,} examples: {said}."
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_all(path: Path, console: Console) -> None:
    """Prints all requests of a ledger."""
    with ledger.known(path) as connection:
        found = ledger.listed(connection)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # In a narrow terminal, cells that neither wrap nor fold would be cut off, or their column left out.
    for name in ("", "examples"):
        table.add_column(name, justify="right", overflow="fold")
    for name in ("state", "made, UTC", "reason"):
        table.add_column(name, overflow="fold")
    for request in found:
        when, reason = request.made[:16].replace("T", " "), escape(printable(request.reason))
        table.add_row(str(request.number), f"{request.examples:,}", request.state, when, reason)
    console.print(table if found else "The ledger has no requests.")


def show_one(number: int, path: Path, console: Console) -> None:
    """Prints a request with its positions."""
    with ledger.known(path) as connection:
        request = ledger.find(connection, number)
        ids = ledger.ids_of(connection, number)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in request._asdict().items():
        table.add_row(name, escape(printable(str(value))))
    shown = ids[:SHOWN] if console.is_terminal else ids
    more = f", and {len(ids) - SHOWN:,} more" if len(ids) > len(shown) else ""
    table.add_row("ids", ", ".join(map(str, shown)) + more)
    console.print(table)
