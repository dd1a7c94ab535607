"""The time that a run takes."""

import time
from typing import NamedTuple


class Seconds(NamedTuple):
    """Wall-clock time, and processor time, which other work on the machine does not lengthen."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """The current time, to be subtracted from a later one."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        """The time from `start` to this one."""
        return Seconds(self.wall - start.wall, self.processor - start.processor)

    def plus(self, other: "Seconds") -> "Seconds":
        """The sum of both."""
        return Seconds(self.wall + other.wall, self.processor + other.processor)


class Stopwatch:
    """The time of a run including its earlier parts, which an interrupted run saves in its history.

    >>> history = {"spent": [2.0, 1.0]}
    >>> clock = Stopwatch(history)
    >>> history["spent"] = [2.0, 1.0]  # as a checkpoint has it
    >>> clock.start(), clock.stop(), clock.save()
    (None, None, None)
    >>> clock.total().wall >= 2.0, history
    (True, {})
    """

    _PLACE = "spent"

    def __init__(self, history: dict):
        self._history, self._spent = history, Seconds(0.0, 0.0)
        self._earlier: Seconds | None = None
        history[self._PLACE] = list(self._spent)

    def start(self) -> None:
        """Starts counting."""
        self._begun = Seconds.now()

    def stop(self) -> None:
        """Adds the time since the start."""
        self._spent = self._spent.plus(Seconds.now().since(self._begun))

    def save(self) -> None:
        """Writes the time so far to the history, which holds that of the earlier parts until then."""
        self._earlier = self._earlier or Seconds(*self._history[self._PLACE])
        self._history[self._PLACE] = list(self._earlier.plus(self._spent).plus(Seconds.now().since(self._begun)))

    def total(self) -> Seconds:
        """The time of all parts, which is removed from the history."""
        saved = Seconds(*self._history.pop(self._PLACE))
        return self._spent.plus(self._earlier or saved)
