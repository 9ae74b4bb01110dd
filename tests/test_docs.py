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


def test_the_readmes_examples_run(tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in examples[0].splitlines() if line.strip()]) <= 12
    pytest.importorskip("torchvision", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    for code in examples:
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
