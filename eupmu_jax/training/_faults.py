"""Errors in which a checkpoint cannot be read although nothing is wrong with it."""

import errno
import os

PASSING = errno.EACCES, errno.EMFILE, errno.ENFILE
# As JAX and what writes its arrays put them into words.
_WORDS = ("RESOURCE_EXHAUSTED", *map(os.strerror, PASSING))


def is_passing(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a lack of permission, of file handles or of memory.

    >>> is_passing(ValueError("RESOURCE_EXHAUSTED: out of memory")), is_passing(ValueError("not a checkpoint"))
    (True, False)
    """
    while error is not None:
        if (isinstance(error, OSError) and error.errno in PASSING) or any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
