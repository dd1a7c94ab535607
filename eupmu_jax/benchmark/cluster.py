"""A benchmark on many machines: its rows are made by the workers of a dask scheduler, and written here alone.

    dask scheduler
    dask worker tcp://host:8786 --nworkers -1 --nthreads 1     # on every machine, a process for each core
    eupmu benchmark classification --cluster tcp://host:8786

The scheduler and the workers need the package and its extras experiments and cluster. Where JAX has an accelerator,
one worker process for each is right; elsewhere JAX_PLATFORMS=cpu in a worker's environment says that there is none.
"""

import logging
import platform
import threading
from concurrent.futures import CancelledError

import jax
from rich.console import Console

from eupmu_jax.benchmark import jobs, rows

ANSWER_SECONDS = 10

# A worker with several threads makes one row at a time: processor seconds are counted for its whole process.
_one_at_a_time = threading.Lock()


def run(
    address: str, training: list[jobs.Job], unlearning: list[jobs.Job], place: jobs.Place, console: Console
) -> None:
    """Makes every row that is missing on the workers of a scheduler.

    Models first, then the trials of all methods, then the runs that they choose. A worker that dies costs the rows it
    was making, and another one makes them again; a driver that dies has written all rows that came back, and the same
    command goes on.

    Args:
      address: Of the scheduler, such as tcp://host:8786.
      training, unlearning: What is to be done, see `runner.jobs_of`.
      place: Its folder lies where every worker sees it under the same path: trained models are kept there. A worker
        that does not see it trains the models it needs once more.
      console: Where the progress goes.

    Raises:
      ValueError: If the package distributed is missing, no scheduler answers, or a worker has another version of a
        method or a design.
      ChildProcessError: If the scheduler went away, or a row killed more workers than it allows, which dask calls
        `distributed.scheduler.allowed-failures` and sets to 3.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cluster: {error.name} is not installed; it comes with: pip install 'eupmu-jax[cluster]'"
        ) from None
    # What the client logs, with a traceback, comes here as an exception too.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cluster: got {address!r}, expected the address of a scheduler, such as tcp://host:8786 ({error})"
        ) from None
    # Workers have other working directories.
    place = place._replace(out=place.out.absolute())
    with client, console.status("") as status:

        def collect(what, tasks):
            status.update(f"{what}: 0 of {len(tasks)}")
            submitted = client.map(_make, *zip(*tasks, strict=True), [place] * len(tasks), pure=False) if tasks else []
            for done, future in enumerate(as_completed(submitted), 1):
                for row in future.result():
                    rows.append(place.rows, row)
                status.update(f"{what}: {done} of {len(tasks)}")

        try:
            made = place.read()
            # One task for the models of a seed: two would train the same ones at once.
            collect("seeds", [(_with_keys(jobs.missing(job, made)), job) for job in training])
            while tasks := _unlearning_tasks(unlearning, place.read()):
                collect("trials and runs", tasks)
        except KilledWorker as error:
            raise ChildProcessError(f"a row was given up, since every worker that made it died: {error}") from None
        except CancelledError as error:
            raise ChildProcessError(
                f"the scheduler at {address} went away; finished rows are kept, and the same command goes on from them"
            ) from error


def _with_keys(pieces):
    return [(piece, piece.key()) for piece in pieces]


def _unlearning_tasks(unlearning, made):
    return [(_with_keys([piece]), None) for job in unlearning for piece in jobs.missing(job, made)]


def _make(wanted, training, place):
    """Rows of some pieces, on a worker, and the models of a training job in the cache."""
    for piece, key in wanted:
        if piece.key() != key:
            raise ValueError(
                f"cluster: got a worker that makes the row {piece.key()}, expected {key}; every machine needs the same "
                "version of eupmu-jax"
            )
    with _one_at_a_time:
        # A folder for each machine: code is compiled for its processor, and JAX's names for it do not tell which.
        jobs.keep_compiled_code(place.cache / "compiled" / platform.node())
        made = [jobs.make(piece, place) for piece, _ in wanted]
        if training:
            jobs.prepare(training, place)
        jax.clear_caches()
    return made
