import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="session")
def language():
    """The tiny language models: `golden[case]`, `tensors(case)` and their tokens; see make_golden_language.py."""
    rules = runpy.run_path(str(Path(__file__).with_name("make_golden_language.py")))
    golden = json.loads(rules["FILE"].read_text())

    def tensors(case):
        return {name: rules["seeded"](name, shape) for name, shape in golden[case]["shapes"].items()}

    smollm2 = json.loads(rules["SMOLLM2"].read_text())
    return SimpleNamespace(golden=golden, tensors=tensors, tokens=rules["tokens"](), smollm2=smollm2)


@pytest.fixture(scope="session")
def write(tmp_path_factory, language):
    """Writes the checkpoint of a case to a folder, with changed settings, or with tensors left out or added."""
    from safetensors.numpy import save_file

    def write(case, without=(), also=(), **settings):
        folder = tmp_path_factory.mktemp(case)
        tensors = {name: tensor for name, tensor in language.tensors(case).items() if name not in without}
        tensors |= {name: np.zeros(2, np.float32) for name in also}
        # Split into two files, as large checkpoints are.
        for k in range(2):
            save_file(dict(list(tensors.items())[k::2]), folder / f"model-{k}.safetensors")
        (folder / "config.json").write_text(json.dumps(language.golden[case]["config"] | settings))
        return folder

    return write
