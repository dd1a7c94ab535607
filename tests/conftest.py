import atexit
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

# In programs as small as those of the tests and of the processes that they start, XLA's optimizations cost more time
# than they save. JAX reads the variable when it is imported, so set it before.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's fusion emitters take most of the compile time, and splitting small programs among threads takes a sixth of the
# rest. XLA aborts on a flag that it does not know, so set each only for the versions known to have it.
if (version := [int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]]) <= [0, 12]:
    flags = "--xla_cpu_use_fusion_emitters=false " if version <= [0, 10] else ""
    flags += "--xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
# Child processes inherit the variable, so all share what one has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="eupmu-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

import pytest
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Clears JAX's caches in time: a program takes about six memory mappings, and past Linux's 65,530 JAX aborts."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def on_devices():
    """Returns the environment of a process in which JAX sees the CPU as `count` devices."""

    def environment(count):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

    return environment


@pytest.fixture
def eupmu(monkeypatch):
    """Runs a command in this process, so that compiled code is reused, and returns its exit code."""

    def run(*arguments):
        from eupmu_jax.commands import cli

        monkeypatch.setattr(sys, "argv", ["eupmu", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    return run


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text, add_special_tokens):
        return type("Encoding", (), {"ids": list(text.encode())})

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode()


@pytest.fixture(scope="session")
def byte_tokens():
    """A stand-in for the tokenizer object that `Tokenizer` wraps, with bytes as its tokens."""
    return Bytes()


@pytest.fixture(scope="module")
def toy_persons():
    """The sets of `benchmark.persons` for seed 0, with a bigram table over bytes as the language model."""
    import jax

    from eupmu_jax.benchmark import persons
    from eupmu_jax.models.language import LanguageModel, Tokenizer

    pytest.importorskip("rouge_score", reason="needs rouge-score")
    apply = lambda params, tokens: params["table"][tokens]
    decode = lambda params, tokens, positions, cache: (params["table"][tokens], cache)
    fresh = {"table": 0.1 * jax.random.normal(jax.random.key(0), (128, 128))}
    language = LanguageModel(fresh, apply, None, decode, lambda n, length: {}, None, 0, None)
    small = {"FORGOTTEN": 6, "RETAINED": 8, "HELD_OUT": 4, "LENGTH": 110, "LONGER": 130}
    options = small | {"EPOCHS": 2, "LEARNING_RATE": 0.1, "model": lambda: (language, Tokenizer(Bytes(), 0, None, 128))}
    # The table has no adapters to merge.
    options |= {"merged": lambda params: (language, params)}
    cached = persons.task, persons.sets
    [function.cache_clear() for function in cached]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setattr(persons, name, value)
        yield persons.sets(0)
    [function.cache_clear() for function in cached]
