"""`eupmu init`: the files that it writes run unchanged."""

import numpy as np
import pytest

from eupmu_jax.service import deletion, user_file


@pytest.mark.slow
def test_the_file_works_unchanged_with_arrays_of_the_names_it_gives(tmp_path, monkeypatch, capsys, eupmu):
    monkeypatch.chdir(tmp_path)
    assert eupmu("init") == 0
    assert "change what is marked CHANGE" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    np.savez("params.npz", hidden=rng.normal(size=(5, 8)).astype(np.float32), out=rng.normal(size=(8, 10)).astype("f4"))
    for name, count in (("data.npz", 200), ("held_out.npz", 100)):
        np.savez(name, inputs=rng.normal(size=(count, 5)).astype(np.float32), labels=rng.integers(10, size=count))
    own = user_file.load(tmp_path / "mytask.py", deletion.NEEDED)
    assert "held_out" in own
    asked = deletion.Asked(limit=5.0, steps=2, forget_batch=8, retain_batch=24)
    reached = deletion.run(own, np.arange(20), tmp_path / "run", asked, "a command")
    assert reached["level"]["source"] == "unseen data by class"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mytask.py", "file: mytask.py exists already; expected a new name"),
        ("task.txt", "file: got task.txt, expected"),
    ],
)
def test_nothing_is_overwritten(name, message, tmp_path, monkeypatch, capsys, eupmu):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytask.py").write_text("mine")
    assert eupmu("init", "--file", name) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "mytask.py").read_text() == "mine"
