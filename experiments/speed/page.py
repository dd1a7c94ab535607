"""The page of speed and memory, from the rows of each script."""

from pathlib import Path

from eupmu_jax.benchmark import rows as store
from experiments import parts

FOLDER = Path(__file__).parent

VARIANTS = ("explicit vmap", "explicit unroll", "explicit auto", "implicit same_batch", "implicit next_batch")
AXES = {"width": "parameters", "objectives": "K", "examples": "examples of a step", "devices": "devices"}


def overhead_table(rows: list[dict]) -> str:
    """Ratios to the plain step, and the temporary memory of each."""
    lines = []
    for label, found in _by_model(rows):
        ratios = [f"{found[variant]['ratio']:.2f}" for variant in VARIANTS]
        memory = [f"{found[variant]['temporary_bytes'] / 1e6:.0f}" for variant in ("plain", "explicit auto")]
        lines.append([label, *ratios, " / ".join(memory)])
    return parts.table(["model, batch", *VARIANTS, "temporary MB, plain / explicit auto"], lines)


def compile_table(rows: list[dict]) -> str:
    """Time to trace and compile, in units of the plain step's."""
    lines = [
        [label, *(f"{found[variant]['compile_ratio']:.2f}" for variant in VARIANTS)] for label, found in _by_model(rows)
    ]
    return parts.table(["model, batch", *VARIANTS], lines)


def surgery_table(rows: list[dict]) -> str:
    """Surgery and its two passes, in units of the memory traffic measured beside them."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["parameters"], row["objectives"], row["dtype"]), {})[row["variant"]] = row
    lines = []
    for (parameters, count, dtype), found in cases.items():
        speed = found["traffic"]["traffic_bytes"] / found["traffic"]["median_seconds"]
        ratios = [f"{found[variant]['ratio']:.2f}" for variant in ("surgery", "gram", "combine")]
        lines.append([f"{parameters / 1e6:.0f} M, {dtype}", str(count), *ratios, f"{speed / 1e9:.0f}"])
    return parts.table(["parameters", "K", "surgery", "Gram matrix alone", "combination alone", "traffic, GB/s"], lines)


def dispatch_table(rows: list[dict]) -> str:
    """Python's share of a loop of steps, and of scans."""
    lines = [
        [
            row["variant"],
            f"{100 * row['python_share']:.2f}",
            f"{1e3 * row['python_seconds']:.2f}",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['ratio']:.3f}",
        ]
        for row in rows
    ]
    return parts.table(["steps made by", "Python, %", "Python, ms a step", "step, ms", "time / loop"], lines)


def scaling_table(rows: list[dict]) -> str:
    """The explicit step in units of the plain one, along each axis."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["axis"], row[row["axis"]]), {})[row["variant"]] = row
    lines = []
    for (axis, value), found in cases.items():
        size = f"{found['plain']['parameters'] / 1e6:.1f} M" if axis == "width" else str(value)
        ratios = [f"{found[variant]['ratio']:.2f}" for variant in ("explicit vmap", "explicit unroll")]
        lines.append([AXES[axis], size, *ratios, f"{1e3 * found['plain']['median_seconds']:.0f}"])
    return parts.table(["", "", "explicit vmap", "explicit unroll", "plain step, ms"], lines)


def profile_table(rows: list[dict]) -> str:
    """Shares of the work of an explicit step."""
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["batch"][0], row["variant"]), {})[row["kind"]] = row["share"]
    kinds = list(next(iter(cases.values())))
    lines = [
        [f"{model}, {size}+{size}, {mode}", *(f"{100 * shares[kind]:.1f}" for kind in kinds)]
        for (model, size, mode), shares in cases.items()
    ]
    return parts.table(["work, %", *kinds], lines)


def memory_table(rows: list[dict]) -> str:
    """The memory of a step beyond its arguments, in copies of the float32 parameters, on one device."""
    places = {"v5e:2x2": "a v5e chip", "cpu:1": "a CPU"}
    found = {(row["step"], row["topology"]): row for row in rows if row["topology"] in places}
    lines = []
    for step in dict.fromkeys(step for step, _ in found):
        cells = [found[step, place]["temporary_bytes"] / (4 * found[step, place]["parameters"]) for place in places]
        state = found[step, "cpu:1"]["argument_bytes"] / (4 * found[step, "cpu:1"]["parameters"])
        lines.append([step, *(f"{cell:.2f}" for cell in cells), f"{state:.2f}"])
    return parts.table(["step", *(f"temporary, {place}" for place in places.values()), "parameters and state"], lines)


def pods_table(rows: list[dict]) -> str:
    """Steps of large models on slices: memory, traffic, operations, and the least time a step can take."""
    lines = []
    for row in rows:
        if row["limit_bytes"] is None or row["mesh"] == {"data": 1, "tensor": 1}:
            continue
        received = sum(received for _, received in row["collectives"].values())
        times = row["roofline_seconds"]
        bound = max(times, key=times.get)
        lines.append(
            [
                f"{row['model']}, {row['step']}" + (", adapters" if row.get("adapters") else ""),
                f"{row['topology']}, {row['mesh']['data']} x {row['mesh']['tensor']}",
                f"{row['batch'][0]}+{row['batch'][1]}" + (f" x {row['sequence']}" if row["sequence"] else " images"),
                f"{row['bytes'] / 1e9:.2f} of {row['limit_bytes'] / 1e9:.0f}",
                f"{received / 1e9:.1f}",
                f"{row['flops'] / 1e12:.1f}",
                f"{1e3 * times[bound]:.0f}, {bound}",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    head = ["model, step", "slice, data x tensor", "batch x tokens", "GB of a chip", "GB received", "TFLOP"]
    return parts.table([*head, "at least ms, bound by", "compiled in s"], lines)


def pods_summary(rows: list[dict]) -> str:
    """The README's sentences on slices of v5e."""
    found = {(row["model"], row["step"]): row for row in rows if row["topology"] == "v5e:16x16"}
    small, plain, large = found["7b", "explicit"], found["7b", "plain"], found["70b", "explicit"]
    size = lambda row: f"{row['bytes'] / 1e9:.1f} GB"
    received = lambda row: f"{sum(received for _, received in row['collectives'].values()) / 1e9:.1f} GB"
    text = (
        f"Compiled on a CPU for 256 chips of TPU v5e (16 GB each): explicit surgery on a decoder of "
        f"{small['parameters'] / 1e9:.1f} billion parameters, {small['batch'][0]} forget and {small['batch'][1]} "
        f"retain sequences of {small['sequence']:,} tokens, takes {size(small)} of a chip (plain: "
        f"{size(plain)}), one of {large['parameters'] / 1e9:.0f} billion {size(large)} with {large['batch'][0]} + "
        f"{large['batch'][1]}. In the former a chip receives {received(small)} instead of {received(plain)}, as two "
        f"gradients are summed; surgery adds {small['gram_all_reduces']} all-reduce of three numbers."
    )
    return parts.paragraph(text)


MAKERS = {
    "step overhead": ("step_overhead", overhead_table),
    "pods in short": ("plans", pods_summary),
    "memory": ("plans", memory_table),
    "pods": ("plans", pods_table),
    "compile time": ("step_overhead", compile_table),
    "surgery alone": ("surgery_alone", surgery_table),
    "dispatch": ("dispatch", dispatch_table),
    "scaling": ("scaling", scaling_table),
    "profile": ("profile_step", profile_table),
}


def blocks() -> dict[str, str]:
    """Every table, and the README's sentences on TPU slices."""
    return {block: make(store.read(FOLDER / f"{name}.jsonl")) for block, (name, make) in MAKERS.items()}


def _by_model(rows):
    """Pairs of a label and the rows by variant, for each model and batch."""
    for plain in (row for row in rows if row["variant"] == "plain"):
        model = plain["model"]
        found = {row["variant"]: row for row in rows if (row["model"], row["batch"]) == (model, plain["batch"])}
        yield f"{model}, {plain['parameters'] / 1e6:.1f} M, {plain['batch'][0]}+{plain['batch'][1]}", found
