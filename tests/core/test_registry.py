"""How a registry finds what other packages add, and what it says of what it does not find."""

import sys

import pytest

from hybrid.core import InputError, Registry
from hybrid.mixing import make_strategy
from hybrid.objectives import objective_class


def install(folder, monkeypatch, module, code, entry):
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hybrid.thing]\n{entry}\n")
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


def test_an_entry_point_is_found_by_its_name(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "own_things", "class Modest: ...\n", "modest = own_things:Modest")
    assert Registry("thing")["Modest"].__module__ == "own_things"


def test_an_entry_point_may_name_the_module_that_registers(tmp_path, monkeypatch):
    things = Registry("thing")
    monkeypatch.setattr(sys, "things", things, raising=False)
    code = "import sys\n@sys.things.register('modest')\nclass Modest: ...\n"
    install(tmp_path, monkeypatch, "more_things", code, "modest = more_things")
    assert things["modest"].__name__ == "Modest"


def test_an_entry_point_that_leads_to_nothing_is_told(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "no_things", "", "modest = no_things")
    with pytest.raises(
        InputError, match=r"'modest' of the group 'hybrid\.thing' leads to 'no_things', which is no class"
    ):
        Registry("thing")["modest"]


@pytest.mark.parametrize(
    ("kind", "find"),
    [("objective", objective_class), ("strategy", lambda name: make_strategy({"strategy": name}))],
)
def test_a_name_that_is_not_found_leads_to_the_entry_points(kind, find):
    with pytest.raises(InputError, match=rf"known: .*\. One of your own: import .* group 'hybrid\.{kind}'"):
        find("zzz")
