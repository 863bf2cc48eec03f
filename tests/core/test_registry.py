"""How a registry finds what other packages add, and what it says of what it does not find."""

import pytest

from hybrid.core import InputError, Registry
from hybrid.mixing import make_strategy
from hybrid.objectives import objective_class


def test_an_entry_point_is_found_by_its_name(tmp_path, monkeypatch):
    info = tmp_path / "own_things-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-things\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hybrid.thing]\nmodest = own_things:Modest\n")
    (tmp_path / "own_things.py").write_text("class Modest: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Registry("thing")["Modest"].__module__ == "own_things"


@pytest.mark.parametrize(
    ("kind", "find"),
    [("objective", objective_class), ("strategy", lambda name: make_strategy({"strategy": name}))],
)
def test_a_name_that_is_not_found_leads_to_the_entry_points(kind, find):
    with pytest.raises(InputError, match=rf"known: .*\. One of your own: import .* group 'hybrid\.{kind}'"):
        find("zzz")
