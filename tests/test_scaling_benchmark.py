"""The benchmark of scaling: its exponents, its picture, and a round of the smallest shapes."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.scaling import COSTS, NOTHING, draw, exponents, power

ROOT = Path(__file__).resolve().parents[1]


def test_of_a_power_law_the_exponent_has_no_error():
    assert power([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx((1.5, 0), abs=1e-12)


def test_an_exponent_and_its_error_by_hand():
    # Logarithms to base 2: (0, 0), (1, 2), (2, 2). Slope 1, residuals -1/3, 2/3, -1/3: sqrt((6/9) / 1 / 2).
    assert power([1, 2, 4], [1, 4, 4]) == pytest.approx((1, (1 / 3) ** 0.5))


def test_the_upper_half_of_five_is_the_last_three():
    # Constant, then linear.
    points = [{"value": x, **dict.fromkeys(COSTS, max(x, 4))} for x in (1, 2, 4, 8, 16)]
    assert exponents(points)["update"]["upper"] == pytest.approx([1, 0], abs=1e-12)
    assert exponents(points)["update"]["all"][0] == pytest.approx(0.5)


def test_what_is_varied_has_two_panels(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append((figure, file)))
    points = [{"value": x, **dict.fromkeys(COSTS, x)} for x in (1, 2, 4)]
    series = {name: {"points": points, "exponents": exponents(points)} for name in ("batch", "width")}
    draw({"base": asdict(NOTHING), "series": series}, tmp_path / "scaling.png")
    ((figure, file),) = drawn
    assert file == tmp_path / "scaling.png"
    labels = [[line.get_label() for line in axes.lines if "_" not in line.get_label()] for axes in figure.axes]
    assert labels == [["generate 1.00", "score 1.00", "update 1.00"]] * 2 + [["memory 1.00"]] * 2


@pytest.mark.slow
def test_a_round_of_the_smallest_shapes_has_exponents():
    command = [sys.executable, "benchmarks/scaling.py", "--quick", "--threads", "1", "--against", "batch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, header, row = done.stdout.splitlines()
    assert header.split() == ["against", "from", "to", *COSTS]
    assert row.split()[:3] == ["batch", "4", "16"]
    # All costs but the memory, which may be less than the libraries' own; of two points a slope has no error.
    assert len(re.findall(r"\d\.\d\d ± \d\.\d\d \| -?\d\.\d\d ± \?", row)) >= 4
