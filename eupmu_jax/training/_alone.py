"""A lock that keeps two processes from writing to one folder."""

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path

# Pause between ten attempts: the lock of a killed run may take a moment to disappear.
ALONE_SECONDS = 0.5


@contextlib.contextmanager
def alone(folder: Path, name: str = "out", *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a folder.

    Args:
      folder: An existing folder.
      name: The argument that the error message names.
      shared: Whether processes started by this one may hold the lock too, each on its own, until they end.

    Raises:
      ValueError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks.
        yield
        return
    with (folder / ".lock").open("a") as lock:
        for _ in range(10):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(ALONE_SECONDS)
            except OSError as error:
                # A network file system without locks.
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                break
        else:
            raise ValueError(f"{name}: another run is using {folder}; expected a folder of its own")
        if shared:
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
