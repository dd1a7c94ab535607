import shutil
import sys

import numpy as np
import pytest

# A plain JAX model that has memorised 300 real digits.
FILE = """
import numpy as np
from experiments.level import run as level

parts = level.split("random:10%", 0)
ids = np.concatenate([parts["forget"].ids, parts["retain"].ids])
at = lambda ids: {name: array[ids] for name, array in level.data().items()}
data, held_out, task = at(ids), at(parts["held_out"].ids), level.TASK
with np.load("params.npz") as saved:
    params = dict(saved)
"""


@pytest.fixture(autouse=True)
def own_modules(monkeypatch):
    """Unloads the modules beside a test's file, so that the next test does not find them."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "pytest-of-" in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    from experiments.level import run as level

    path = tmp_path_factory.mktemp("trained") / "params.npz"
    np.savez(path, **level.original(0))
    return path


@pytest.fixture
def file(trained, tmp_path, monkeypatch):
    """A user's file, in the working folder, and 30 positions in `ids.txt`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained, tmp_path)
    (tmp_path / "mytask.py").write_text(FILE)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(30))))
    return tmp_path / "mytask.py"
