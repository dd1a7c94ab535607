import itertools
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from eupmu_jax import data, sharding
from eupmu_jax.training.mesh import feed

MESH = sharding.make_mesh(1)
FORGET, RETAIN = np.arange(0, 20), np.arange(100, 137)


def identity(ids):
    return {"id": ids}


def drawn(start, count):
    return [tuple(batch["id"].tolist() for batch in batches) for batches in itertools.islice(start, count)]


def test_every_pass_takes_each_example_once_in_a_new_order():
    steps = drawn(feed.batches(identity, [FORGET, RETAIN], [4, 37], MESH, seed=0)(0), 10)
    forget = np.array([forget for forget, _ in steps]).reshape(2, 20)
    retain = np.array([retain for _, retain in steps])
    assert np.array_equal(np.sort(forget), np.tile(FORGET, (2, 1)))
    assert np.array_equal(np.sort(retain), np.tile(RETAIN, (10, 1)))
    assert not np.array_equal(forget[0], forget[1])
    assert not np.array_equal(forget[0], FORGET)


def test_a_batch_may_span_two_passes():
    steps = drawn(feed.batches(identity, [FORGET], [8], MESH, seed=0)(0), 5)
    assert sorted(itertools.chain(*(forget for (forget,) in steps))) == sorted([*FORGET, *FORGET])


@pytest.mark.parametrize("threads", [0, 2])
def test_the_batches_of_a_step_do_not_depend_on_the_first_step(threads):
    start = feed.batches(identity, [FORGET, RETAIN], [8, 5], MESH, seed=3, threads=threads)
    assert drawn(start(7), 3) == drawn(start(0), 10)[7:]
    assert drawn(start(10**8), 1) == drawn(start(10**8 - 1), 2)[1:]


def test_batches_of_one_example_and_larger_than_the_set():
    steps = drawn(feed.batches(identity, [FORGET, RETAIN[:3]], [1, 7], MESH, seed=0)(0), 20)
    assert sorted(forget for ((forget,), _) in steps) == FORGET.tolist()
    assert {len(retain) for _, retain in steps} == {7}
    assert {steps[0][1].count(example) for example in RETAIN[:3].tolist()} == {2, 3}


def test_the_seed_decides_the_order_of_every_set():
    first, second = (drawn(feed.batches(identity, [FORGET, FORGET], [20, 20], MESH, seed=s)(0), 1)[0] for s in (0, 1))
    assert len({tuple(order) for order in (*first, *second)}) == 4


def test_batches_hold_the_images_and_labels_of_their_ids():
    digits = data.load("digits")
    split = data.split(digits.train_labels, "class:3", num_classes=10, seed=0)
    read = lambda ids: {"images": digits.train_images[ids], "labels": digits.train_labels[ids], "ids": ids}
    forget, retain = next(feed.batches(read, [split.forget_ids, split.retain_ids], [16, 48], MESH, seed=0)(0))
    assert set(forget["labels"].tolist()) == {3}
    assert 3 not in retain["labels"].tolist()
    chex.assert_shape(retain["images"], (48, 8, 8, 1))
    np.testing.assert_array_equal(retain["images"], digits.train_images[retain["ids"]])


@pytest.mark.parametrize(
    ("ids", "sizes", "message"),
    [
        ([FORGET], [4, 4], "sizes: got 2 for 1 sets"),
        ([FORGET, RETAIN[:0]], [4, 4], "ids: set 1 is empty"),
        ([FORGET, RETAIN], [4, 0], "sizes: got 0 for set 1, expected a multiple"),
    ],
)
def test_bad_sizes_are_refused_before_anything_is_read(ids, sizes, message):
    with pytest.raises(ValueError, match=message):
        feed.batches(lambda ids: pytest.fail("read"), ids, sizes, MESH, seed=0)


def test_a_reader_that_drops_rows_is_detected():
    with pytest.raises(ValueError, match=r"read: got a leaf of shape \(3,\) for 4 ids"):
        next(feed.batches(lambda ids: ids[1:], [FORGET], [4], MESH, seed=0)(0))


SCRIPT = """
import jax, numpy as np, pytest
from jax.sharding import Mesh
from eupmu_jax import sharding
from eupmu_jax.training.mesh import feed

def batch(mesh):
    read = lambda ids: np.stack([ids, ids], 1)
    batch, = next(feed.batches(read, [np.arange(100)], [16], mesh, seed=0)(5))
    assert batch.sharding == sharding.batch_shardings(batch, mesh)
    return batch

meshes = [sharding.make_mesh(1), sharding.make_mesh(8), sharding.make_mesh(4, 2), sharding.make_mesh(2, 4)]
shuffled = Mesh(np.array(jax.devices())[[5, 2, 7, 0, 1, 4, 6, 3]], ("data",))
batches = [batch(mesh) for mesh in meshes]
for other in batches[1:]:
    np.testing.assert_array_equal(other, batches[0])
read = lambda ids: ids
found, = next(feed.batches(read, [np.arange(100)], [16], shuffled, seed=0)(5))
np.testing.assert_array_equal(found, batches[0][:, 0])
with pytest.raises(ValueError, match="sizes: got 12 for set 0, expected a multiple of the mesh axis data, 8"):
    feed.batches(read, [np.arange(100)], [12], meshes[1], seed=0)
"""


@pytest.mark.slow
def test_the_mesh_changes_the_sharding_of_a_batch_and_not_its_values(on_devices):
    finished = subprocess.run([sys.executable, "-c", SCRIPT], env=on_devices(8), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize("make", [feed.batches, feed.layout])
def test_a_mesh_without_the_data_axis_is_refused(make):
    arguments = lambda ids: {"x": ids}, [np.arange(3)], [3], jax.make_mesh((1,), ("model",))
    with pytest.raises(ValueError, match=r"^mesh: got axes model, expected data among them"):
        make(*arguments, **({"seed": 0} if make is feed.batches else {}))
