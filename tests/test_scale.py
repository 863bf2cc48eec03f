"""What docs/scale.md says on paper is what two processes hold and send, and its tables are the scripts' own."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.distributed import in_table
from benchmarks.ppo_sizes import llama
from benchmarks.scale import MODELS, Shape, held, markdown, sent

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "distributed-cpu-1-threads.json").read_text())
ROWS = {row["engine"]: row for row in MEASURED["rows"]}
SHARED = [engine for engine in ROWS if engine != "local"]


def shape(settings):
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return Shape(*(settings["shape"][name] for name in names), settings["vocabulary"])


MODEL = shape(MEASURED["settings"])


def test_the_weights_of_a_shape_are_those_of_its_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        small = llama(3, 64, 96, 4, 2)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=101, tie_word_embeddings=tied, **small))
        value_head = 64 + 1
        found = Shape(3, 64, 96, 4, 2, 101, tied).weights
        assert found == sum(x.numel() for x in model.parameters()) + value_head


@pytest.mark.parametrize("engine", ROWS)
def test_a_process_holds_what_the_formula_says(engine):
    # Of an odd number of weights a part is padded.
    assert held(MODEL.weights, engine, ROWS[engine]["processes"]) == pytest.approx(ROWS[engine]["bytes"], rel=0.01)


@pytest.mark.parametrize("engine", SHARED)
def test_an_update_sends_what_the_formula_says(engine):
    counted, whole = ROWS[engine]["sft"]["sent"], sent(MODEL, engine)
    gathered = sum(count for kind, count in counted.items() if "gather" in kind)
    reduced = sum(count for kind, count in counted.items() if "reduce" in kind)
    assert reduced == pytest.approx(whole["reduced"], rel=0.01)
    if engine == "deepspeed-3":  # it keeps what fits, and gathers more where the kinds of steps take turns
        assert 0.5 <= gathered / whole["gathered"] <= 1.5
    else:
        assert gathered == pytest.approx(whole["gathered"], rel=0.01, abs=1e4)


def test_the_table_on_paper_is_what_the_script_prints():
    assert markdown() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_measured_table_is_that_of_the_result():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for row in MEASURED["rows"]:
        cells = in_table(row)
        names = ("sft s", "sft efficiency", "sft by cpu", "sft talking", "ppo s", "ppo efficiency", "ppo by cpu",
                 "ppo talking", "peak MiB", "weights", "gradients", "states")  # fmt: skip
        line = [f"{row['engine']}, {row['processes']}"]
        line += [f"{cells[name]:.2f}" if isinstance(cells[name], float) else str(cells[name]) for name in names]
        assert f"| {' | '.join(line)} |" in text


def test_the_models_on_paper_have_the_sizes_of_their_names():
    billions = {name: shape.weights / 1e9 for name, shape in MODELS.items()}
    assert billions == pytest.approx({"1.5B": 1.54, "8B": 8.03, "70B": 70.55}, rel=0.005)
