"""Captured decoding on a GPU: the graph's tokens are the uncaptured steps' tokens."""

import pytest
import torch
from tiny import WIDE, tiny_model

from hybrid.data import left_pad
from hybrid.models import Backbone, Policy
from hybrid.rollout import RolloutConfig, SamplingConfig, TorchEngine, sample
from hybrid.rollout.steps import Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WINDOWED = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 6}
MODELS = {"gpt2": {}, "llama": {}, "qwen3": {}, "mistral": WINDOWED, "gemma3_text": {**WINDOWED, "head_dim": 8}}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def drawn(backbone, graphs=None, seed=0, prompts=PROMPTS, **options):
    ids, mask = (x.cuda() for x in left_pad(prompts, pad_id=0))
    generator = torch.Generator("cuda").manual_seed(seed)
    config = SamplingConfig(**{"max_new_tokens": 24, "temperature": 1.5} | options)
    return sample(backbone, ids, mask, config, eos_ids=[2], generator=generator, graphs=graphs)


@pytest.mark.parametrize("family", MODELS)
def test_a_captured_step_draws_what_uncaptured_steps_draw(family, recwarn):
    backbone = Backbone(tiny_model(family, **MODELS[family]).cuda()).eval()
    graphs = Graphs()
    for seed in range(3):
        found, wanted = drawn(backbone, graphs, seed), drawn(backbone, seed=seed)
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.mask, wanted.mask)
        torch.testing.assert_close(found.logprob, wanted.logprob, rtol=0, atol=1e-5)
    ((_, steps),) = graphs._known.items()
    assert steps.graph is not None, [str(w.message) for w in recwarn]


def test_a_graph_sees_new_weights_and_other_prompts():
    backbone, graphs = Backbone(tiny_model("llama").cuda()).eval(), Graphs()
    drawn(backbone, graphs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.1)
    for prompts in (PROMPTS, [[20, 21], [22, 23, 24, 25], [26]]):
        assert torch.equal(drawn(backbone, graphs, prompts=prompts).ids, drawn(backbone, prompts=prompts).ids)
    assert len(graphs._known) == 1


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.8}, {"min_new_tokens": 6}, {"temperature": 0.0}])
def test_other_ways_of_drawing_are_captured_too(options):
    backbone = Backbone(tiny_model("llama").cuda()).eval()
    assert torch.equal(drawn(backbone, Graphs(), **options).ids, drawn(backbone, **options).ids)


def test_under_autocast_the_engine_captures_its_shadow():
    policy = Policy(tiny_model("llama").cuda())
    ids, mask = (x.cuda() for x in left_pad(PROMPTS, pad_id=0))
    answers = []
    for graphs in (True, False):
        engine = TorchEngine(policy, RolloutConfig(cuda_graphs=graphs))
        with torch.autocast("cuda", torch.bfloat16):
            for seed in range(2):
                generator = torch.Generator("cuda").manual_seed(seed)
                answers.append(
                    engine.generate(ids, mask, SamplingConfig(max_new_tokens=24), eos_ids=[2], generator=generator)
                )
    for found, wanted in zip(answers[:2], answers[2:], strict=True):
        # bfloat16's rounding, in another order, may turn a draw at the edge between two tokens.
        same = (found.ids[:, :1] == wanted.ids[:, :1]).float().mean()
        assert same >= 0.6 and found.logprob.isfinite().all()


def test_a_step_that_cannot_be_captured_is_taken_as_it_is(monkeypatch):
    backbone = Backbone(tiny_model("llama").cuda()).eval()
    right = Backbone.next_logits

    def reads_to_the_host(self, ids, *rest):
        assert int(ids.sum()) >= 0
        return right(self, ids, *rest)

    monkeypatch.setattr(Backbone, "next_logits", reads_to_the_host)
    with pytest.warns(UserWarning, match="not captured as a CUDA graph"):
        found = drawn(backbone, Graphs())
    assert torch.equal(found.ids, drawn(backbone).ids)
