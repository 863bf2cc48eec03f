"""docs/tour.md leads to files and names that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(\.\./([^)#]+)\)", TOUR)
# [file](path) `name`, `name` and `name`: each is of the file before it.
NAMED = [
    (path, name)
    for path, names in re.findall(r"\]\(\.\./([^)]+\.py)\)((?:[\s,:;]|and|`\w+`)*)", TOUR)
    for name in re.findall(r"`(\w+)`", names)
]


@pytest.mark.parametrize("path", LINKS)
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_name_is_in_its_file(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named |= {
        t.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    named |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert name in named


def test_it_names_enough_to_lead_someone():
    assert len(NAMED) > 25
