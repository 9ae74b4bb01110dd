"""What the documents promise: README's example runs, and so does every example in a docstring."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import sparsekit

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(sparsekit.__path__, "sparsekit.") if not m.name.endswith("__main__")]


def test_the_readmes_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    pytest.importorskip("torchvision", exc_type=ImportError)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name == "sparsekit._C":
        pytest.skip("not a Python module")
    try:
        module = importlib.import_module(name)
    except (ImportError, SystemExit, AttributeError) as error:
        pytest.skip(f"needs an extra: {error}")
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module)
    assert failed == 0
