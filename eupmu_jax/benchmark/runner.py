"""`eupmu benchmark classification`: computes what a design lacks, with one process per core or on a cluster."""

import fcntl
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eupmu_jax.benchmark import cluster as on_cluster
from eupmu_jax.benchmark import designs, jobs, rows
from eupmu_jax.data.dataset import num_classes
from eupmu_jax.methods import METHODS
from eupmu_jax.methods import method as known_method
from eupmu_jax.training._alone import ALONE_SECONDS, alone
from eupmu_jax.training._faults import make_folder


def jobs_of(
    name: str, forget: list[str], methods: list[str], seeds: list[int]
) -> tuple[list[jobs.Job], list[jobs.Job]]:
    """The training jobs, one for each seed, and one job for each method and case; empty lists mean all of them.

    Raises:
      ValueError: For an unknown design, forget set or method, with a list of the known ones; for the tuning seed; and
        for a seed whose class the data set lacks.
    """
    design = designs.design(name)
    known = [case.forget for case in design.cases]
    for chosen in forget:
        if chosen not in known:
            raise ValueError(f"forget: got {chosen!r}, expected one of {', '.join(known)}")
    for method in methods:
        known_method(method)
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise ValueError(f"seeds: got {seed}, expected numbers from 0 to {2**31 - 1}")
    if design.tuning_seed in seeds:
        raise ValueError(f"seeds: got {design.tuning_seed}, on which the methods are tuned; expected others")
    cases = tuple(case for case in design.cases if not forget or case.forget in forget)
    reported, classes = designs.of_seeds(name, seeds).seeds, num_classes(design.data)
    for case, seed in itertools.product(cases, reported):
        if case.forget.startswith("class:") and int(case.of(seed).removeprefix("class:")) >= classes:
            raise ValueError(
                f"seeds: got {seed}, which forgets {case.of(seed)}, expected seeds that end in 0 to {classes - 1}, the "
                f"classes of {design.data}"
            )
    training = [jobs.Job(name, cases, (seed,), None) for seed in (design.tuning_seed, *reported)]
    pairs = itertools.product(dict.fromkeys(methods or METHODS), cases)
    unlearning = [jobs.Job(name, (case,), reported, method) for method, case in pairs]
    return training, unlearning


def run(
    name: str,
    forget: list[str],
    methods: list[str],
    seeds: list[int],
    out: Path,
    command: str,
    console: Console,
    *,
    workers: int = 0,
    cluster: str = "",
) -> None:
    """Computes the rows that `out` lacks; an interrupted run resumes.

    Args:
      name, forget, methods, seeds: See `jobs_of`.
      out: Folder of the rows, see `jobs.Place`.
      command: Command that the rows record.
      console: Where the progress is printed.
      workers: Number of processes; 0 means one per core, or a single one where JAX has an accelerator.
      cluster: Address of a dask scheduler, whose workers compute the rows instead of local processes.

    Raises:
      ValueError: For invalid arguments, an invalid line in the file of rows, or another process at work in `out`.
      ChildProcessError: If one of the processes was killed; finished rows are kept.
    """
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected a number of processes, or 0 for one on each core")
    training, unlearning = jobs_of(name, forget, methods, seeds)
    make_folder("out", out)
    with alone(out, shared=True):
        place = jobs.Place(out, command)
        counted = place.read()
        unlearning = [job for job in unlearning if jobs.missing(job, counted)]
        # Rows from another machine may exist without the models, which the methods need.
        training = [job for job in training if unlearning or jobs.missing(job, counted)]
        if cluster:
            on_cluster.run(cluster, training, unlearning, place, console)
            return
        cores = rows.cores()
        workers = workers or (1 if _has_accelerator() else len(cores))
        _in_processes(training, unlearning, place, cores, workers, console)


def _run(job, place):
    jobs.run(job, place)
    if job.method is None:
        # The rows may exist without the models, which two methods at once would both train.
        jobs.prepare(job, place)
    # Compiled programs of finished jobs hold memory maps, whose number is limited per process.
    jax.clear_caches()


def _in_processes(training, unlearning, place, cores, workers, console):
    # Spawned processes share nothing with this one, which does not need JAX.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for index in range(workers):
        queue.put(cores[index % len(cores)] if workers > 1 else None)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True), console=console)
    with ProcessPoolExecutor(workers, context, _start, (queue, place.out, os.getpid())) as pool, progress:
        try:
            for description, batch in (("models (seeds)", training), ("methods x forget sets", unlearning)):
                if not batch:
                    continue
                bar = progress.add_task(description, total=len(batch))
                pending = {pool.submit(_run, job, place) for job in batch}
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        progress.advance(bar)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process of the benchmark was killed, perhaps for lack of memory; finished rows are kept, and "
                    "the same command resumes from them"
                ) from error
            raise


def _start(queue, out, parent):
    """Initialises a worker process: pins it to a core, ignores SIGINT, and ends it as soon as its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock = (out / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)

    def watch(lock):
        # Holds the lock until this process ends, so that no other run starts while it may still write.
        while os.getppid() == parent:
            time.sleep(ALONE_SECONDS)
        os._exit(1)

    # Before waiting for a core, as the parent may have ended by then.
    threading.Thread(target=watch, args=(lock,), daemon=True).start()
    core = queue.get()
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    jobs.keep_compiled_code(out / "cache" / "compiled")


def _has_accelerator():
    """Whether JAX has an accelerator; checked in a process of its own, since this one would keep the device."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_backend).result() != "cpu"


def _backend():
    return jax.default_backend()
