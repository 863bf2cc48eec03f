"""A study of benchmarks/ in the test's own process: importing torch once more would take longer than its runs."""

import sys
from types import ModuleType

import pytest


def studied(
    study: ModuleType, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """What its command prints, and says on the way; its jobs are made one after the other."""
    monkeypatch.setattr(sys, "argv", [str(study.__file__), *arguments])
    if hasattr(study, "in_processes"):
        monkeypatch.setattr(study, "in_processes", lambda make, jobs, _: enumerate(map(make, jobs), start=1))
    study.main()
    out, err = capsys.readouterr()
    return out, err
