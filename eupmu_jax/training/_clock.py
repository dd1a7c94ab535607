"""Time that a run takes."""

import time
from typing import NamedTuple


class Seconds(NamedTuple):
    """Time on the clock, and of the processor, which other work on the machine does not lengthen."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """To be subtracted from a later one."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        """The time from `start` to this one."""
        return Seconds(self.wall - start.wall, self.processor - start.processor)

    def plus(self, other: "Seconds") -> "Seconds":
        """The sum of both."""
        return Seconds(self.wall + other.wall, self.processor + other.processor)
