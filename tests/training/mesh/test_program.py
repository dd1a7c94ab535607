"""Collectives of real programs on eight forced host devices, and of HLO lines in the form of the TPU compiler."""

import json
import subprocess
import sys

import pytest

from eupmu_jax.training.mesh.program import KINDS, Collective, collectives

SCRIPT = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from eupmu_jax.training.mesh.program import collectives
from eupmu_jax.sharding import make_mesh

ring = [(i, (i + 1) % 4) for i in range(4)]
programs = {
    "psum": (lambda x: jax.lax.psum(x, "data"), P("data"), P()),
    "psum over both axes": (lambda x: jax.lax.psum(x, ("data", "model")), P(("data", "model")), P()),
    "all_gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P()),
    "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "model", tiled=True), P(), P("model")),
    "all_to_all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), P("data"), P("data")),
    "ppermute": (lambda x: jax.lax.ppermute(x, "data", ring), P("data"), P("data")),
}

def compiled(function, before, after, shape, dtype):
    mapped = jax.shard_map(function, mesh=make_mesh(4, 2), in_specs=before, out_specs=after, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, dtype)).compile().as_text()

def row(text):
    return [[c.kind, c.size, c.group, c.times, c.received] for c in collectives(text)]

rows = {}
for name, (function, before, after) in programs.items():
    scanned = lambda x: jax.lax.scan(lambda carry, y: (carry, function(y)), 0, x)[1]
    twice = lambda x: jax.lax.scan(lambda carry, y: (carry, scanned(y)), 0, x)[1]
    of = lambda *axes: [P(*axes, *spec) for spec in (before, after)]
    rows[name] = {
        "once": row(compiled(function, before, after, (64, 3), jnp.float32)),
        "half": row(compiled(function, before, after, (64, 3), jnp.int16)),
        "scanned": row(compiled(scanned, *of(None), (5, 64, 3), jnp.float32)),
        "nested": row(compiled(twice, *of(None, None), (7, 5, 64, 3), jnp.float32)),
    }
none = lambda x: jnp.tanh(x) @ x.T
rows["none"] = row(compiled(none, P("data"), P("data"), (64, 3), jnp.float32))
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows(on_devices):
    finished = subprocess.run([sys.executable, "-c", SCRIPT], env=on_devices(8), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


WHOLE = 64 * 3 * 4


@pytest.mark.parametrize(
    ("name", "kind", "size", "group", "received"),
    [
        ("psum", "all-reduce", WHOLE / 4, 4, 2 * 3 / 4 * WHOLE / 4),
        ("psum over both axes", "all-reduce", WHOLE / 8, 8, 2 * 7 / 8 * WHOLE / 8),
        ("all_gather", "all-gather", WHOLE, 4, 3 / 4 * WHOLE),
        ("reduce_scatter", "reduce-scatter", WHOLE / 2, 2, WHOLE / 2),
        ("all_to_all", "all-to-all", WHOLE / 4, 4, 3 / 4 * WHOLE / 4),
        ("ppermute", "collective-permute", WHOLE / 4, 2, WHOLE / 4),
    ],
)
def test_collectives_of_compiled_programs(rows, name, kind, size, group, received):
    row = rows[name]
    assert row["once"] == [[kind, size, group, 1, received]]
    assert row["scanned"] == [[kind, size, group, 5, 5 * received]]
    assert row["nested"] == [[kind, size, group, 35, 35 * received]]
    if kind not in ("all-reduce", "reduce-scatter"):  # XLA sums 16-bit numbers in 32 bits.
        assert row["half"] == [[kind, size / 2, group, 1, received / 2]]


def test_a_program_without_communication_has_no_collectives(rows):
    assert rows["none"] == []


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step, is_scheduled=true\n\n{before}ENTRY %main.1 (param: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups=[4,64]<=[64,4]T(1,0)", 64),
        ("replica_groups=[64,4]<=[256]", 4),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
        ("replica_groups={{0}}", 1),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['data'=16,'model'=4]{'data'}", 16),
    ],
)
def test_group_sizes_are_read_in_every_notation(groups, expected):
    line = f"%sum = f32[3]{{0:T(128)}} all-reduce(%param), channel_id=1, {groups}, to_apply=%add.1"
    found = collectives(entry(line))
    assert found == [Collective("all-reduce", "f32[3]", 12, expected, 1)]
    assert found[0].received == pytest.approx(12 * 2 * (expected - 1) / expected)


@pytest.mark.parametrize(
    ("dtype", "size"), [("f32", 4), ("bf16", 2), ("f16", 2), ("s8", 1), ("pred", 1), ("f64", 8), ("u32", 4)]
)
def test_layouts_do_not_affect_sizes(dtype, size):
    shape = f"{dtype}[6,128]{{1,0:T(8,128)(2,1)S(1)}}"
    line = f"%all = {shape} all-gather(%param), replica_groups=[2,4]<=[8], dimensions={{0}}"
    assert collectives(entry(line)) == [Collective("all-gather", f"{dtype}[6,128]", 768 * size, 4, 1)]


def test_a_reduction_of_several_arrays_is_one_collective_of_their_total_size():
    line = "%sum = (f32[3]{0}, /*index=1*/bf16[4,2]{1,0}, f32[]) all-reduce(%a, %b, %c), replica_groups=[1,8]<=[8]"
    (found,) = collectives(entry(line))
    assert (found.shape, found.size) == ("(f32[3], bf16[4,2], f32[])", 12 + 16 + 4)


def test_asynchronous_collectives_count_once_with_the_size_of_their_result():
    found = collectives(
        entry(
            "%g = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8]",
            "%g.1 = f32[8,8]{1,0} all-gather-done(%g)",
            "%s = f32[3]{0} all-reduce-start(%p.1), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add",
            "%s.1 = f32[3]{0} all-reduce-done(%s)",
            "%c = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%p.2), channel_id=3, "
            "source_target_pairs={{0,1},{1,0}}",
            "%c.1 = f32[6]{0} collective-permute-done(%c)",
        )
    )
    assert [(c.kind, c.size, c.group, c.received) for c in found] == [
        ("all-gather", 256, 4, 192.0),
        ("all-reduce", 12, 4, 18.0),
        ("collective-permute", 24, 2, 24),
    ]


ADD = "%add (x: f32[], y: f32[]) -> f32[] {\n  ROOT %sum = f32[] add(%x, %y)\n}\n\n"
PART = "  %g = f32[64]{{0:T(128)}} all-gather(%p), channel_id={channel}, replica_groups=[1,8]<=[8], dimensions={{0}}\n"


def computation(name, channel):
    return f"%{name} (p: f32[8]) -> f32[64] {{\n{PART.format(channel=channel)}}}\n\n"


def test_parts_of_one_channel_are_one_collective():
    calls = [f"%f.{i} = f32[64]{{0}} fusion(%param), kind=kCustom, calls=%part.{i}" for i in range(3)]
    split = "".join(computation(f"part.{i}", 7) for i in range(3))
    apart = "".join(computation(f"part.{i}", 7 + i) for i in range(3))
    assert len(collectives(entry(*calls, before=split))) == 1
    assert len(collectives(entry(*calls, before=apart))) == 3


def test_collectives_without_a_channel_are_distinguished_by_their_lines():
    line = "%g{} = f32[64]{{0}} all-gather(%param), replica_groups=[1,8]<=[8], dimensions={{0}}"
    assert len(collectives(entry(line.format(".1"), line.format(".2")))) == 2


def test_computations_that_are_never_called_do_not_count():
    assert collectives(entry("ROOT %x = f32[8] add(%param, %param)", before=computation("dead", 1))) == []


def condition(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%cond (state: (s32[], f32[8])) -> pred[] {{\n{body}\n}}\n\n"


COUNTER = "%i = s32[] get-tuple-element(%state), index=0"
LOOP = "%loop = (s32[], f32[8]) while(%init), condition=%cond, body=%body"


@pytest.mark.parametrize(
    ("test", "attributes", "turns"),
    [
        ([COUNTER, "%n = s32[] constant(6)", "ROOT %lt = pred[] compare(%i, %n), direction=LT"], "", 6),
        ([COUNTER, "%n = s32[]{:T(128)} constant(6)", "ROOT %lt = pred[] compare(%i, %n), direction=LT"], "", 6),
        ([COUNTER, "%n = s32[] constant(6)", "ROOT %gt = pred[] compare(%i, %n), direction=GT"], "", 1),
        ([COUNTER, "ROOT %p = pred[] custom-call(%i)"], "", 1),
        ([COUNTER, "ROOT %p = pred[] custom-call(%i)"], ', backend_config={"known_trip_count":{"n":"9"}}', 9),
    ],
    ids=["from its condition", "with a layout", "of another direction", "unknown", "known"],
)
def test_the_trip_count_of_a_loop_comes_from_the_compiler_or_its_condition(test, attributes, turns):
    before = ADD + computation("body", 1) + condition(*test)
    (found,) = collectives(entry(LOOP + attributes, before=before))
    assert found.times == turns
    assert found.received == turns * 256 * 7 / 8


def test_a_computation_called_from_two_places_counts_twice():
    calls = ["%a = f32[64] fusion(%param), calls=%shared", "%b = f32[64] call(%param), to_apply=%shared"]
    assert [c.times for c in collectives(entry(*calls, before=computation("shared", 1)))] == [2]


def test_every_branch_counts():
    switch = "%c = f32[64] conditional(%i, %x, %y), branch_computations={%first, %second}"
    either = "%d = f32[64] conditional(%p, %x, %y), true_computation=%third, false_computation=%fourth"
    names = ("first", "second", "third", "fourth")
    before = "".join(computation(name, channel) for channel, name in enumerate(names, 1))
    assert [c.times for c in collectives(entry(switch, either, before=before))] == [1, 1, 1, 1]


def test_only_operation_names_make_a_collective():
    lines = [f'%{kind}.1 = f32[8] add(%param, %{kind}.0), metadata={{op_name="{kind}"}}' for kind in KINDS]
    assert collectives(entry(*lines)) == []


@pytest.mark.parametrize(
    ("shape", "size"), [("f8e4m3fn[1024]", 1024), ("c64[1024]", 8192), ("s4[3]", 2), ("pred[7]", 7), ("bf16[8]", 16)]
)
def test_sizes_of_unusual_dtypes(shape, size):
    (found,) = collectives(entry(f"%a = {shape} all-reduce(%p), channel_id=1, replica_groups={{{{0,1}}}}"))
    assert (found.size, found.group) == (size, 2)


def test_without_groups_all_devices_take_part():
    line = "%a = f32[8] all-reduce(%p), channel_id=1, replica_groups={}"
    text = entry(line)
    head, _, rest = text.partition("\n")
    (found,) = collectives(f"HloModule m, num_partitions=16\n{text if not head.startswith('HloModule') else rest}")
    assert found.group == 16
