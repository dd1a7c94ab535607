"""Paths from which checkpoints cannot be read, and read errors for which the checkpoint is not to blame."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import jax

PASSING = errno.EACCES, errno.EMFILE, errno.ENFILE
# As JAX and the library that stores its arrays word them.
_WORDS = ("RESOURCE_EXHAUSTED", *map(os.strerror, PASSING))
# A URL, also as `pathlib` writes it, with one slash. The drives of Windows have one letter.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def is_passing(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a lack of permission, of file handles or of memory.

    >>> is_passing(ValueError("RESOURCE_EXHAUSTED: out of memory")), is_passing(ValueError("not a checkpoint"))
    (True, False)
    """
    while error is not None:
        if (isinstance(error, OSError) and error.errno in PASSING) or any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_readable(name: str, path: str | os.PathLike[str]) -> None:
    r"""Raises `ValueError` unless this is a path, and for one that Orbax would not read as written.

    >>> check_readable("out", "runs/request 17")
    >>> check_readable("out", "/runs/request[17]")
    Traceback (most recent call last):
    ValueError: out: got /runs/request[17], expected a path without any of [ ] * ?
    >>> check_readable("out", "/runs/caf\udce9")
    Traceback (most recent call last):
    ValueError: out: got '/runs/caf\udce9', expected a path in UTF-8
    >>> check_readable("out", Path("gs://bucket/run"))
    Traceback (most recent call last):
    ValueError: out: got gs:/bucket/run, expected a path, or a string that starts with gs:// or s3://
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name}: got {path!r}, expected a path")
    if _URL.match(str(path)) and not str(path).startswith(("gs://", "s3://")):
        raise ValueError(f"{name}: got {path}, expected a path, or a string that starts with gs:// or s3://")
    where = str(path) if "://" in str(path) else str(Path(path).absolute())
    if set("[]*?") & set(where):
        raise ValueError(f"{name}: got {path}, expected a path without any of [ ] * ?")
    # What Python makes of bytes that are not UTF-8, which is all that Orbax can pass on.
    if any("\ud800" <= character <= "\udfff" for character in where):
        raise ValueError(f"{name}: got {str(path)!r}, expected a path in UTF-8")


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` for a URL, even one that `pathlib` has taken for a path.

    >>> check_local("out", Path("runs/1"))
    >>> check_local("out", Path("gs://bucket/run"))
    Traceback (most recent call last):
    ValueError: out: got gs://bucket/run, expected a local path; URLs are for `unlearn(directory=...)`
    """
    if _URL.match(str(path)):
        url = _URL.sub(r"\1://", str(path), count=1)
        raise ValueError(f"{name}: got {url}, expected a local path; URLs are for `unlearn(directory=...)`")


def located(path: str | os.PathLike[str]) -> Any:
    """The absolute path, or the URL, of a folder, as an `etils.epath.Path`."""
    # Imported lazily: only checkpoints need it.
    from etils import epath

    found = epath.Path(path)
    # A URL already counts as absolute; `absolute()` would turn it into a local path.
    return found if found.is_absolute() else found.absolute()


def check_storage(name: str, path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` for a URL that cannot be read, or where nothing is and nothing can be written."""
    if "://" not in str(path):
        return
    try:
        folder = located(path)
        if not folder.exists() and jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_text("")
            probe.unlink()
    except Exception as error:
        # Packages for storage raise many kinds of error; that of a missing package says which one to install.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{name}: cannot use {path} ({reason}); expected a bucket to read and write") from error


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` if a file, or a link to nothing, is where a folder or one of its parents should be."""
    where = Path(path).absolute()
    found = next(part for part in (where, *where.parents) if os.path.lexists(part))
    if not os.path.isdir(found):
        in_the_way = "which is a file" if found == where and found.is_file() else f"but {found} is not a folder"
        raise ValueError(f"{name}: got {path}, {in_the_way}, expected a folder, which need not exist")


def make_folder(name: str, path: Path) -> None:
    """Creates a folder unless it exists, which may be read-only; raises `ValueError` if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot write to {path} ({error.strerror}); expected a writable folder") from None
