"""Transformers' Auto classes know our models, whatever was imported first, and a saved folder stands alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from hybrid.models.recurrent import after_import

ROOT = Path(__file__).resolve().parents[3]
MAKE = (
    "; from transformers import AutoConfig, AutoModelForCausalLM"
    "; made = AutoModelForCausalLM.from_config(AutoConfig.for_model('hybrid_recurrent', hidden_size=8))"
    "; print(type(made).__module__)"
)
FIRST = [
    "import hybrid",
    "import hybrid; from transformers import LlamaForCausalLM",
    "import hybrid, transformers.modeling_layers",
    "from transformers import AutoModelForCausalLM; import hybrid",
]


def run(code, **options):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_the_auto_classes_know_them_whatever_was_imported_first(first):
    assert run(first + MAKE) == "hybrid.models.recurrent.modeling_recurrent"


@pytest.mark.slow
def test_a_saved_folder_carries_its_code_for_those_who_have_no_hybrid(tmp_path):
    tiny_model("slots").save_pretrained(tmp_path / "model")
    load = (
        "import sys; sys.modules['hybrid'] = None\n"
        "from transformers import AutoModelForCausalLM as A\n"
        f"made = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=%s)\n"
        "import torch; print(type(made).__name__, made.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[0])"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    assert run(load % True, env=env) == "RecurrentForCausalLM 1"
    assert "trust_remote_code=True" in run(load % False, env=env)


def test_a_call_waits_for_its_module_and_comes_once(tmp_path, monkeypatch):
    name = "awaited_by_a_test"
    (tmp_path / f"{name}.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found, finders = [], len(sys.meta_path)
    after_import(name, lambda: found.append(sys.modules[name].VALUE))
    assert found == []
    __import__(name)
    __import__(name)
    assert found == [3] and len(sys.meta_path) == finders
    # Pytest has one loader for many modules: another one is loaded without the call.
    (tmp_path / "another_test.py").write_text("VALUE = 4\n")
    __import__("another_test")
    assert found == [3]
    after_import(name, lambda: found.append("at once"))
    assert found == [3, "at once"]
    del sys.modules[name], sys.modules["another_test"]


def test_a_module_that_is_nowhere_is_not_found_as_before(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("nowhere_to_be_found", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        __import__("nowhere_to_be_found")
