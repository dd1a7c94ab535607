"""A benchmark on many machines: the workers of a dask scheduler compute its rows, and this process writes them.

    dask scheduler
    dask worker tcp://host:8786 --nworkers -1 --nthreads 1     # on every machine, a process per core
    eupmu benchmark classification --cluster tcp://host:8786

The scheduler and the workers need the package with its extras experiments and cluster. Where JAX has accelerators, run
one worker process for each; elsewhere set JAX_PLATFORMS=cpu in a worker's environment.
"""

import logging
import platform
import threading
from concurrent.futures import CancelledError

import jax
from rich.console import Console

from eupmu_jax.benchmark import jobs, rows

ANSWER_SECONDS = 10

# A worker with several threads computes one row at a time, since processor time is measured for the whole process.
_one_at_a_time = threading.Lock()


def run(
    address: str, training: list[jobs.Job], unlearning: list[jobs.Job], place: jobs.Place, console: Console
) -> None:
    """Computes every missing row on the workers of a scheduler.

    Models come first, then the trials of all methods, then the runs that they select. If a worker dies, another one
    recomputes the rows it was working on. If the driver dies, all rows that came back are written, and the same command
    resumes.

    Args:
      address: Address of the scheduler, such as tcp://host:8786.
      training, unlearning: The jobs, see `runner.jobs_of`.
      place: Every worker should see its folder under the same path, since trained models are kept there. A worker that
        does not see it trains the models it needs again.
      console: Where the progress is printed.

    Raises:
      ValueError: If the package distributed is missing, no scheduler answers, or a worker has another version of a
        method or a design.
      ChildProcessError: If the scheduler went away, or a row killed more workers than dask's
        `distributed.scheduler.allowed-failures`, 3 by default.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cluster: {error.name} is not installed; it comes with: pip install 'eupmu-jax[cluster]'"
        ) from None
    # The client logs, with a traceback, what it raises here as well.
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
            # One task per seed: two would train the same models at once.
            collect("seeds", [(_with_keys(jobs.missing(job, made)), job) for job in training])
            while tasks := _unlearning_tasks(unlearning, place.read()):
                collect("trials and runs", tasks)
        except KilledWorker as error:
            raise ChildProcessError(f"a row was given up, since every worker that computed it died: {error}") from None
        except CancelledError as error:
            raise ChildProcessError(
                f"the scheduler at {address} went away; finished rows are kept, and the same command resumes from them"
            ) from error


def _with_keys(pieces):
    return [(piece, piece.key()) for piece in pieces]


def _unlearning_tasks(unlearning, made):
    return [(_with_keys([piece]), None) for job in unlearning for piece in jobs.missing(job, made)]


def _make(wanted, training, place):
    """Computes the rows of some pieces on a worker, and caches the models of a training job."""
    for piece, key in wanted:
        if piece.key() != key:
            raise ValueError(
                f"cluster: got a worker that computes the row {piece.key()}, expected {key}; every machine needs the "
                "same version of eupmu-jax"
            )
    with _one_at_a_time:
        # A folder per machine: code is compiled for its processor, which JAX's cache keys do not identify.
        jobs.keep_compiled_code(place.cache / "compiled" / platform.node())
        made = [jobs.make(piece, place) for piece, _ in wanted]
        if training:
            jobs.prepare(training, place)
        jax.clear_caches()
    return made
