"""Files of ids: what is read from them, and that no content causes a traceback."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.service import read_ids


def write(folder, text):
    path = folder / "ids.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_positions_are_read_in_order_without_comments_and_empty_lines(tmp_path):
    path = write(tmp_path, "# the customer's\n7\n\n 3 # the second\r\n12\n")
    found = read_ids(path, 13)
    assert found.tolist() == [3, 7, 12]
    assert found.dtype == np.int64
    # BUG: the byte order mark that some editors write was taken for a part of the first position.
    assert read_ids(write(tmp_path, b"\xef\xbb\xbf3\n7\n"), 13).tolist() == [3, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ntwo\n", r"ids: .*, line 2: got 'two', expected a position from 0 to 9"),
        ("1\n-2\n", r"line 2: got '-2', expected a position from 0 to 9"),
        ("1.5\n", r"line 1: got '1.5'"),
        ("3\n10\n", r"line 2: got 10, but the data have 10 examples; expected a position from 0 to 9"),
        ("3\n4\n3\n", r"line 3: got 3, which line 1 already has; expected each position once"),
        ("# nothing\n\n", r"has no positions, expected at least one"),
        (b"\xff\xfe\x00", r"expected a text file with one position per line"),
        ("9" * 400, r"line 1: got '9{40}', expected a position"),
        ("\u0663\n", r"line 1: got '\u0663', expected a position"),
    ],
)
def test_invalid_content_is_named_with_its_line(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_ids(write(tmp_path, text), 10)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ids: .* is not there; expected a text file"):
        read_ids(tmp_path / "absent.txt", 10)
    with pytest.raises(ValueError, match="expected a text file"):
        read_ids(tmp_path, 10)


@given(content=st.binary(max_size=60) | st.text(alphabet="0123456789# \n-.x\x00", max_size=60).map(str.encode))
def test_any_file_gives_positions_or_a_value_error_that_names_it(content, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("fuzz"), content)
    try:
        found, said = read_ids(path, 50), ""
    except ValueError as error:
        found, said = np.array([0]), str(error)
    assert not said or (said.startswith("ids: ") and str(path) in said)
    assert len(set(found.tolist())) == len(found) > 0
    assert found.min() >= 0
    assert found.max() < 50
