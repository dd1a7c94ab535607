"""The tables of the benchmarks' rows; `tables.py` puts them into the documents."""

from rows import markdown, read

VARIANTS = ("explicit vmap", "explicit unroll", "explicit auto", "implicit same_batch", "implicit next_batch")
AXES = {"width": "parameters", "objectives": "K", "examples": "examples of a step", "devices": "devices"}


def overhead_table(rows: list[dict]) -> str:
    """Ratios to the plain step, and the temporary memory of each."""
    lines = []
    for label, found in _by_model(rows):
        ratios = [f"{found[variant]['ratio']:.2f}" for variant in VARIANTS]
        memory = [f"{found[variant]['temporary_bytes'] / 1e6:.0f}" for variant in ("plain", "explicit auto")]
        lines.append([label, *ratios, " / ".join(memory)])
    return markdown(["model, batch", *VARIANTS, "temporary MB, plain / explicit auto"], lines)


def compile_table(rows: list[dict]) -> str:
    """Time to trace and compile, in units of the plain step's."""
    lines = [
        [label, *(f"{found[variant]['compile_ratio']:.2f}" for variant in VARIANTS)] for label, found in _by_model(rows)
    ]
    return markdown(["model, batch", *VARIANTS], lines)


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
    return markdown(["parameters", "K", "surgery", "Gram matrix alone", "combination alone", "traffic, GB/s"], lines)


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
    return markdown(["steps made by", "Python, %", "Python, ms a step", "step, ms", "time / loop"], lines)


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
    return markdown(["", "", "explicit vmap", "explicit unroll", "plain step, ms"], lines)


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
    return markdown(["work, %", *kinds], lines)


MAKERS = {
    "compile time": ("step_overhead", compile_table),
    "surgery alone": ("surgery_alone", surgery_table),
    "dispatch": ("dispatch", dispatch_table),
    "scaling": ("scaling", scaling_table),
    "profile": ("profile_step", profile_table),
}


def speed_tables() -> dict[str, str]:
    """Every table by its name in the documents; one is made for each file of rows that exists."""
    return {table: make(rows) for table, (name, make) in MAKERS.items() if (rows := read(name))}


def _by_model(rows):
    """Pairs of a label and the rows by variant, for each model and batch."""
    for plain in (row for row in rows if row["variant"] == "plain"):
        model = plain["model"]
        found = {row["variant"]: row for row in rows if (row["model"], row["batch"]) == (model, plain["batch"])}
        yield f"{model}, {plain['parameters'] / 1e6:.1f} M, {plain['batch'][0]}+{plain['batch'][1]}", found
