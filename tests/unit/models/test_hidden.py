from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.models.hidden import hidden


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that can be imported and has not been."""
    (tmp_path / "seldom_seen.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "seldom_seen", raising=False)
    return "seldom_seen"


def test_a_package_is_not_there_inside_and_is_there_again_outside(package: str) -> None:
    with hidden(package):
        assert importlib.util.find_spec(package) is None
        with pytest.raises(ImportError):
            importlib.import_module(package)
    found = importlib.import_module(package)
    with hidden(package):  # imported already: nothing is taken away from whoever has it
        assert importlib.import_module(package) is found


def test_an_error_inside_does_not_hide_it_for_good(package: str) -> None:
    with pytest.raises(RuntimeError), hidden(package):
        raise RuntimeError
    assert importlib.import_module(package)


def test_adapters_do_without_bitsandbytes_until_weights_are_quantised():
    code = (
        "import sys, torch, burnish.models.adapters as a, peft.import_utils as u\n"
        "from burnish.config.sections import Adapter\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "c = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "a.attach(LlamaForCausalLM(c), Adapter(rank=2))\n"
        "print('bitsandbytes' in sys.modules, u.is_bnb_available())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
