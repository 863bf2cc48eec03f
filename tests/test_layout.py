"""The floors of the house: imports run down only, and `kernels` stays a plain folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports files of lower floors, or of its own room. The first pattern that fits is the file's floor.
FLOORS = {
    "core": 1,
    "functional": 1,
    "run": 1,
    "fused": 2,
    "data": 2,
    "distributed": 2,
    "optim": 2,
    "rewards": 3,
    "models": 3,
    "memory": 3,
    "scoring": 4,
    "rollout": 4,
    "objectives": 5,
    "evaluate": 6,
    "mixing": 6,
    "model_config": 6,
    "config": 7,
    "edits": 8,
    "corpus": 8,
    "host": 9,
    "setup": 9,
    "loaders": 9,
    "supply": 10,
    "datastore": 10,
    "measured": 11,
    "learner": 12,
    "ahead": 13,
    "resume": 13,
    "export": 14,
    "loop": 15,
    "trainer": 16,
    "demo": 17,
    "cli": 18,
    "__main__": 19,
    "__init__": 19,
}
# The two ground floors that know nothing of each other, and core, which everyone may use.
STANDALONE = {"functional": {"functional"}, "core": {"core"}, "run": {"run", "core"}}
FILES = sorted((ROOT / "hybrid").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "hybrid").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of `hybrid` that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "hybrid" else [f"hybrid.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("hybrid.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{path} stands on no floor: give its room one"
    for other in imported_rooms(path):
        assert other == here or FLOORS[other] < FLOORS[here] or other == "core", f"{here} imports {other}"
        if here in STANDALONE:
            assert other in STANDALONE[here], f"{here} may import only {STANDALONE[here]}, not {other}"


def test_kernels_import_nothing_of_hybrid() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported_rooms(path), path


def test_no_cli_or_trainer_is_imported_from_below() -> None:
    for path in FILES:
        if room(path) not in ("cli", "demo", "__init__", "__main__"):
            assert not imported_rooms(path) & {"cli", "trainer"} or room(path) in ("trainer", "cli"), path


def test_kernels_has_no_init() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_finds_its_own_kernels_package_from_the_root() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import transformers.integrations.hub_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_importing_hybrid_loads_neither_transformers_nor_triton() -> None:
    code = "import sys, hybrid; print([m for m in ('transformers', 'triton', 'datasets', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folders_init_is_imports_and_all_only(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        is_all = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_all or is_docstring or isinstance(node, ast.ImportFrom), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_passes_the_wall_of_400_lines(path: Path) -> None:
    assert path.read_text().count("\n") <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_takes_a_learner_says_so_in_its_type(path):
    typed = {"learner": "Learner", "trainer": "HybridTrainer"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.arg in typed:
                    hint = "" if argument.annotation is None else ast.unparse(argument.annotation)
                    assert typed[argument.arg] in hint, f"{node.name}({argument.arg}: {hint or '?'})"
