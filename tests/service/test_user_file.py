"""A user's file: the names it defines, and the messages when it fails."""

import sys
from pathlib import Path

import numpy as np
import pytest

from eupmu_jax.service import user_file
from eupmu_jax.tasks import as_examples


def write(folder, text, name="mytask.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_names_are_read_from_the_file_which_can_import_modules_beside_it(tmp_path):
    write(tmp_path, "count = 5", "beside_it.py")
    path = write(tmp_path, "import numpy as np\nfrom beside_it import count\ndata = {'x': np.arange(count)}\n")
    assert user_file.load(path, ("data",))["data"]["x"].tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_changes_the_working_directory_does_not_change_what_paths_mean(tmp_path, monkeypatch):
    # BUG: a relative --out then lay elsewhere, and the file itself was not found.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path, "import os\nos.chdir('elsewhere')\ndata = os.getcwd()\n")
    found = user_file.load(Path("mytask.py"), ("data",))
    assert (found["data"], Path.cwd()) == (str(tmp_path / "elsewhere"), tmp_path)


@pytest.mark.parametrize("mesh", ["sharding.make_mesh()", "None"])
def test_examples_put_on_a_device_are_moved_to_the_host_if_there_is_a_mesh(mesh, tmp_path):
    # BUG: JAX refused such examples beside parameters on the mesh, after all steps of the run.
    text = "import jax, numpy as np\nfrom eupmu_jax import sharding\nheld_out = jax.device_put(np.ones(3))\n"
    path = write(tmp_path, f"{text}data, mesh = {{'x': jax.device_put(np.arange(5))}}, {mesh}\n")
    data, held_out = (as_examples("", user_file.load(path, ("data",))[name]) for name in ("data", "held_out"))
    assert data[np.array([3, 1])]["x"].tolist() == [3, 1]
    assert {isinstance(leaf, np.ndarray) for leaf in (data.tree["x"], held_out.tree)} == {mesh != "None"}


def test_a_missing_name_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"file: .*mytask.py does not define `data`; expected `data`, `task` in it"):
        user_file.load(write(tmp_path, "task = 1"), ("data", "task"))


def test_a_missing_file_and_a_file_that_is_not_python_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file: .* is not there; expected a Python file that defines `data`"):
        user_file.load(tmp_path / "absent.py", ("data",))
    with pytest.raises(ValueError, match=r"file: got .*ids.txt, expected a Python file"):
        user_file.load(write(tmp_path, "1", "ids.txt"), ("data",))


@pytest.mark.parametrize("raised", ["1 / 0", "raise SystemExit(3)", "import a_module_that_is_not_there"])
def test_an_error_in_the_file_is_shown_with_only_the_lines_of_the_file(raised, tmp_path):
    path = write(tmp_path, f"def inner():\n    {raised}\n\n\ninner()\n")
    with pytest.raises(user_file.UserFileError) as caught:
        user_file.load(path, ("data",))
    said = str(caught.value)
    assert "line 2, in inner" in said
    assert "line 5, in <module>" in said
    assert "runpy" not in said
    assert "user_file.py" not in said


def test_an_error_in_a_module_beside_it_is_shown_too(tmp_path):
    # BUG: it gave a traceback through this library, and exit code 1.
    write(tmp_path, "def apply():\n    return {}['x']\n", "beside_that.py")
    with pytest.raises(user_file.UserFileError, match=r'(?s)mytask.py".*beside_that.py", line 2, in apply.*KeyError'):
        user_file.load(write(tmp_path, "from beside_that import apply\napply()\n"), ("data",))


def test_a_syntax_error_names_the_line(tmp_path):
    with pytest.raises(user_file.UserFileError, match=r'mytask.py", line 2'):
        user_file.load(write(tmp_path, "x = 1\nthis is no python\n"), ("data",))


class Lazy:
    """Examples that are produced on request."""

    def __len__(self):
        return 2_500

    def __getitem__(self, positions):
        return {"x": np.asarray(positions) * 2}


def test_the_digest_depends_on_the_examples_and_not_on_their_container():
    array = {"x": np.arange(2_500) * 2}
    assert user_file.data_digest(Lazy()) == user_file.data_digest(array)
    changed = {"x": array["x"].copy()}
    changed["x"][2_400] += 1
    assert user_file.data_digest(changed) != user_file.data_digest(array)
    assert user_file.data_digest({"y": array["x"]}) != user_file.data_digest(array)


def test_a_function_may_import_a_module_beside_the_file_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "another_beside.py").write_text("number = 7")
    (tmp_path / "mytask.py").write_text(
        "def retrain(positions):\n    import another_beside\n    return another_beside.number"
    )
    assert user_file.load(tmp_path / "mytask.py", ("retrain",))["retrain"]([]) == 7


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^file: got .*, which is a folder, expected a Python file"):
        user_file.load(tmp_path, ())


def test_a_name_similar_to_one_that_is_read_is_warned_about(tmp_path):
    # BUG: silently, the level was that of chance.
    path = tmp_path / "mytask.py"
    path.write_text("heldout = data = 1\n")
    with pytest.warns(UserWarning, match=r"defines `heldout`, which is not read; `held_out` is$"):
        user_file.load(path, ("data",))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.array(["a", 1] * 2, object), r"got groups that cannot be sorted \("),
        ([None, None, "b", "b"], "got None for example 0, expected a group for each"),
        (np.array([1.0, 1.0, np.nan, 1.0]), "got nan for example 2, expected a group for each"),
        ([1, 2], r"got shape \(2,\), expected \(4,\): one for each example of data"),
    ],
)
def test_invalid_groups_are_named(groups, message):
    # BUG: these ended in raw errors of Python and NumPy.
    with pytest.raises(ValueError, match=f"^groups: {message}"):
        user_file.groups_of({"groups": groups}, range(4), np.array([1]))


def test_groups_without_retained_examples_are_counted():
    own = {"groups": ["a", "a", "b", "b", "c", "c"]}
    to_go = lambda ids, earlier: user_file.groups_to_go(own, range(6), np.array(ids), np.array(earlier, int))
    assert (to_go([0, 1, 2], []), to_go([0, 2], []), to_go([0, 2], [1]), to_go([0, 4, 5], [1, 2, 3])) == (1, 0, 1, 2)
    assert user_file.groups_to_go({}, range(6), np.array([0]), np.array([], int)) == 0
