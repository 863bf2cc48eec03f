"""The benchmark of decoders: equal budgets, its picture, and a round of the smallest size."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decoding import arms, draw, lines
from hybrid.rollout import make_decoder

ROOT = Path(__file__).resolve().parents[1]
POINTS = [{"budget": 2, "tokens": [80.0], "reward": [0.5], "distinct_2": [0.9], "seconds": [0.01]}]


@pytest.mark.parametrize("budget", [2, 4, 8, 16])
def test_every_arm_spends_its_budget(budget):
    length = 44
    for name, spec in arms(budget, length).items():
        made = make_decoder(spec)
        spent = {
            "mcmc": lambda m: length + m.steps * length / 2,
            "ppo_mcts": lambda m: m.simulations * length,
            "value_guided": lambda m: m.width * m.branch * length,
        }.get(made.name, lambda m: m.n * length)(made)
        assert spent == budget * length, name


def test_the_picture_has_a_line_for_each_decoder_and_two_for_what_does_not_search(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    found = {"sample": POINTS, "greedy": POINTS, "mcmc": POINTS, "smc": POINTS}
    draw(found, tmp_path / "decoding.png")
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["sample", "greedy", "mcmc", "smc"]
    assert lines(found)[2] == {
        "decoder": "mcmc", "budget": "2", "tokens": "80", "reward": "0.500 ± 0.000", "distinct-2": "0.90", "ms": "10",
    }  # fmt: skip


@pytest.mark.slow
def test_a_round_of_the_smallest_size_has_every_decoder():
    command = [sys.executable, "benchmarks/decoding.py", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    for name in ("sample", "greedy", *arms(4, 8)):
        assert any(row.startswith(name) for row in rows), name
