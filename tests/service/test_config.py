"""The TOML file of settings: the order of precedence, and one clear error for anything invalid."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupmu_jax.commands import init
from eupmu_jax.service import config
from eupmu_jax.service.deletion import Asked


def test_the_command_line_overrides_the_file_and_the_file_overrides_the_defaults(tmp_path):
    path = tmp_path / "numbers.toml"
    path.write_text("limit = 2\nsteps = 50\n")
    assert config.asked(path, limit=0.5, steps=None) == Asked(limit=0.5, steps=50)
    assert config.asked(None) == Asked()


def test_the_file_that_init_writes_states_the_defaults(tmp_path):
    init.write(tmp_path / "mytask.py")
    assert config.asked(tmp_path / "mytask.toml") == Asked()
    assert set(tomllib.loads((tmp_path / "mytask.toml").read_text())) == set(Asked._fields) - {"limit"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = 'much'", "has 'much' for limit, expected a number"),
        ("steps = 1.5", "has '1.5' for steps, expected a whole number"),
        ("seed = true", "has 'True' for seed, expected a whole number"),
        ("method = 'EUPMU'", "has 'method', expected some of limit, steps, seed, forget_batch, retain_batch"),
        ("[limit]", "has '{}' for limit, expected a number"),
        ("limit =", "cannot be read"),
    ],
)
def test_invalid_content_is_named(text, message, tmp_path):
    path = tmp_path / "numbers.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config: .*numbers\.toml") as raised:
        config.asked(path)
    assert message in str(raised.value)


WORDS = st.sampled_from(["limit", "steps", "seed", "=", "1", "[", "]", "'", '"', "\n", "#", "{", ".", "nan", "1e999"])
TEXT = st.lists(WORDS | st.text(max_size=3), max_size=12).map(" ".join)


@given(content=TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
def test_any_file_gives_numbers_or_a_value_error_that_names_it(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "numbers.toml"
    path.write_bytes(content)
    said = ""
    try:
        assert isinstance(config.asked(path), Asked)
    except ValueError as error:
        said = str(error)
    assert not said or (said.startswith(f"config: {path}") and "expected" in said)


def test_the_toml_file_beside_the_users_file_gives_what_the_command_line_does_not(tmp_path):
    assert config.beside(tmp_path / "mytask.py") is None
    (tmp_path / "mytask.toml").write_text("limit = 0.2\nsteps = 7")
    assert config.beside(tmp_path / "mytask.py") == tmp_path / "mytask.toml"
    assert config.asked(config.beside(tmp_path / "mytask.py"), steps=9) == Asked(limit=0.2, steps=9)
    for text in ("[model]\nlayers = 3", "limit = ", ""):
        (tmp_path / "mytask.toml").write_text(text)
        assert config.beside(tmp_path / "mytask.py") == (None if text else tmp_path / "mytask.toml")
    assert config.beside(tmp_path / "") is None
    # BUG: with one misspelt field, the whole file was silently ignored.
    (tmp_path / "mytask.toml").write_text("limit = 0.2\nstpes = 500")
    with pytest.raises(ValueError, match=r"mytask.toml has 'stpes', expected some of limit, steps"):
        config.asked(config.beside(tmp_path / "mytask.py"))


@pytest.mark.parametrize(("text", "named"), [("limmit = 0.1", "limmit"), ("[run]\nlimit = 0.1", "run")])
def test_a_single_misspelt_field_or_one_in_a_table_is_named(text, named, tmp_path):
    # BUG: such a file was taken for one of another program, and the run had ten times the limit.
    (tmp_path / "mytask.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"mytask.toml has '{named}', expected some of limit, steps"):
        config.asked(config.beside(tmp_path / "mytask.py"))


def test_a_file_that_is_not_toml_is_ignored_with_a_warning(tmp_path, caplog):
    (tmp_path / "mytask.toml").write_text("limit = 0,1")
    assert config.beside(tmp_path / "mytask.py") is None
    assert "mytask.toml is ignored, as it is not valid TOML" in caplog.text
