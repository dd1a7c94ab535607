"""A benchmark on many machines: its rows are made by the workers of a dask scheduler, and written here alone."""

from rich.console import Console

from eupmu_jax.benchmark import jobs, rows

# How often a row is tried on another worker when the one that makes it dies.
RETRIES = 3


def run(
    address: str, training: list[jobs.Job], unlearning: list[jobs.Job], place: jobs.Place, console: Console
) -> None:
    """Makes every row that is missing on the workers of a scheduler.

    Models first, then the trials of all methods, then the runs that they choose. A worker that dies costs the rows it
    was making, and another one makes them again; a driver that dies has written all rows that came back, and the same
    command goes on.

    Args:
      address: Of the scheduler, such as tcp://host:8786; `dask scheduler` and `dask worker` start one.
      training, unlearning: What is to be done, see `runner.jobs_of`.
      place: Its folder lies where every worker sees it under the same path: trained models are kept there.
      console: Where the progress goes.

    Raises:
      ValueError: If the package distributed is missing, or no scheduler answers.
      ChildProcessError: If a row killed its worker `RETRIES` times.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ModuleNotFoundError:
        raise ValueError("cluster: distributed is not installed; it comes with the extra cluster") from None
    try:
        client = Client(address, timeout=10)
    except OSError as error:
        raise ValueError(f"cluster: no scheduler at {address} ({error})") from None
    with client, console.status("") as status:
        try:

            def collect(what, function, arguments):
                submitted = client.map(function, arguments, [place] * len(arguments), retries=RETRIES, pure=False)
                for done, future in enumerate(as_completed(submitted)):
                    for row in future.result():
                        rows.append(place.rows, row)
                    status.update(f"{what}: {done + 1} of {len(arguments)}")

            made = place.read()
            collect("seeds", _models, [(job, jobs.missing(job, made)) for job in training])
            while pieces := [piece for job in unlearning for piece in jobs.missing(job, place.read())]:
                collect("trials and runs", _row, pieces)
        except KilledWorker as error:
            raise ChildProcessError(f"a row was given up, since every worker that made it died: {error}") from error


def _models(job_and_pieces, place):
    """Rows of a seed's models, and the models in the cache; one task, since two would train the same models at once."""
    job, pieces = job_and_pieces
    _share_compiled_code(place)
    made = [jobs.make(piece, place) for piece in pieces]
    jobs.prepare(job, place)
    return made


def _row(piece, place):
    _share_compiled_code(place)
    return [jobs.make(piece, place)]


def _share_compiled_code(place):
    import jax

    jax.config.update("jax_compilation_cache_dir", str((place.out / "cache" / "compiled").absolute()))
