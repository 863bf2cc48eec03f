"""docs/rewards.md: every spec in it builds or says what to install, and its table is the registry's own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward, reward_schema

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)]
SPECS = [spec for block in BLOCKS for spec in (block if isinstance(block, list) else [block])]
# What a machine may lack: a library, a model that a package carries, WordNet, another Python.
MISSING = r"pip install|nltk.downloader|interpreter .* cannot be run"


@pytest.mark.parametrize("spec", SPECS, ids=json.dumps)
def test_every_spec_builds_or_says_what_to_install(spec):
    try:
        make_reward(spec)
    except InputError as error:
        assert re.search(MISSING, str(error)), error


@pytest.mark.parametrize("spec", SPECS, ids=json.dumps)
def test_every_spec_is_valid_by_the_schema(spec):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(spec, reward_schema())


@pytest.fixture(scope="module")
def printed():
    """The table of types, from a process of its own: other tests register types."""
    command = [sys.executable, "-m", "hybrid", "reward", "--list", "--markdown"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_type_has_an_example(printed):
    shown = set(re.findall(r'"type": "(\w+)"', DOCS))
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines()[2:] if line.startswith("| ")]
    documented = {names.split(", ")[0].removeprefix("postprocess: ") for names in rows}
    assert len(documented) > 50
    # Three need no example beside their row in the table.
    assert documented - {"(all rewards)", "product", "min", "max"} <= shown


def test_the_table_is_what_the_command_prints(printed):
    assert printed.strip() in DOCS
