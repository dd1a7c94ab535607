import subprocess
import sys

import pytest

from eupmu_jax.data import load


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^name: got 'mnist', want 'digits' or 'fashion_mnist'$"):
        load("mnist")


def test_import_is_light():
    check = "import sys, eupmu_jax.data; print(sorted({'sklearn', 'tensorflow_datasets'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
