"""The collectives of a compiled program, read from its HLO text, with every iteration of a loop counted."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes of an element, for types whose name does not contain the number of bits.
BYTES = {"pred": 1.0, "token": 0.0}


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: One of `KINDS`.
      shape: Shape of its result on each device, as HLO writes it, without layouts.
      size: Bytes of the result.
      group: Number of devices that take part.
      times: How often it runs in one call of the program.
    """

    kind: str
    shape: str
    size: int
    group: int
    times: int

    @property
    def received(self) -> float:
        """Bytes that each device receives in one call of the program, with ring algorithms."""
        others = self.group - 1
        passes = {"all-reduce": 2 * others / self.group, "reduce-scatter": others, "collective-permute": 1}
        return self.times * self.size * passes.get(self.kind, others / self.group)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`, for any platform.

    Returns:
      One entry for each; an asynchronous one counts once. A loop of unknown length counts as one iteration.
    """
    blocks = _computations(text)
    times = _times(blocks)
    # If no groups are named, all devices take part.
    everyone = max([2, *map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0]))])
    found = {}
    for name, lines in blocks.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)", line)
            if match and times.get(name):
                shape, kind, started, rest = match.groups()
                shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
                # The start of an asynchronous operation returns its operand and its result, and perhaps more.
                size = max(_sizes(shape)) if started and kind != "all-reduce" else sum(_sizes(shape))
                channel = re.search(r"channel_id=(\d+)", rest)
                # A TPU splits a collective into parts with the same channel, so that other work can run in between.
                found[channel[1] if channel else (name, line)] = Collective(
                    kind, shape, size, _group(rest, everyone), times[name]
                )
    return list(found.values())


def _computations(text):
    """Lines of each computation by its name; the entry computation's name is ""."""
    blocks: dict[str, list[str]] = {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = blocks.setdefault("" if head[1] else head[2], [])
        elif line.startswith(" ") and blocks:
            lines.append(line)
    return blocks


def _times(blocks):
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(name, count):
        times[name] = times.get(name, 0) + count
        for line in blocks.get(name, ()):
            turns = _turns(line, blocks) if " while(" in line else 1
            for called in re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", line):
                visit(called, count * turns)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in re.findall(r"[\w.\-]+", group):
                    visit(called, count)

    visit("", 1)
    return times


def _turns(line, blocks):
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    if known:
        return int(known[1])
    condition = "\n".join(line for name in re.findall(r"condition=%?([\w.\-]+)", line) for line in blocks[name])
    # The counter of a scan starts at 0 and is compared with a constant.
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _sizes(shape):
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [math.ceil(_bytes(dtype) * math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in parts] or [0]


def _bytes(dtype):
    """Bytes of an element: f8e4m3fn has 8 bits, c64 has 64, and so on."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return BYTES.get(dtype, 4.0) if bits is None else int(bits[1]) / 8


def _group(attributes, everyone):
    groups = re.search(r"replica_groups=(\[\d+,(\d+)\]<=|\{\{([\d,]*)\}|mesh\[(.*?)\] ?\{(.*?)\})", attributes)
    if groups is None:
        # Pairs of sources and targets.
        return everyone if "replica_groups={}" in attributes else 2
    if groups[2]:
        return int(groups[2])
    if groups[3] is not None:
        return len(groups[3].split(","))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[4]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[5]))
