"""The benchmark of rollouts: its limit, and a round of what needs no other package."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ppo_sizes import Size, write_model
from benchmarks.rollout import limit

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("tied", [False, True])
def test_the_limit_is_bandwidth_over_the_bytes_of_a_token(tied, tmp_path):
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 2, "tie_word_embeddings": tied}  # fmt: skip
    size = Size("llama", shape, vocabulary=10, num_prompts=4, prompt_length=3, response_length=5)
    write_model(tmp_path, size, seed=0, device="cpu")
    # q and o 64 each, k and v 32 each, the MLP's three 128 each, three norms of 8, and the head's 80; no embedding.
    weights = 2 * 64 + 2 * 32 + 3 * 128 + 3 * 8 + 80
    # The tokens see 3 to 7 before them, 5 on average: of each a key and a value of 2 heads of 2.
    assert limit(tmp_path, size, 1e6, 4) == pytest.approx(1e6 / 4 / (weights / 4 + 5 * 2 * 4))


@pytest.mark.slow
def test_a_round_runs_and_an_engine_that_does_not_start_is_left_out():
    command = [sys.executable, "benchmarks/rollout.py", "--quick", "--threads", "1", "--sizes", "tiny",
               "--contenders", "ours", "ours:bfloat16", "generate", "static", "vllm",
               "--vllm-python", "false"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, header, *rows = done.stdout.splitlines()
    assert first.startswith("tiny: 16 x (32 + 48) tokens; ")
    assert second == "vllm is left out: ended with status 1"
    assert header.split()[:2] == ["size", "contender"]
    assert [row.split()[1] for row in rows] == ["ours", "ours:bfloat16", "generate", "static"]
