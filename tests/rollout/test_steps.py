"""The fast ways to decode against the plain one: transformers' own cache, one forward a token."""

import pytest
import torch
from tiny import CELLS, FAMILIES, WIDE, tiny_model

from hybrid.data import left_pad
from hybrid.models import Backbone, takes_fixed_cache
from hybrid.rollout import SamplingConfig, sample
from hybrid.rollout.draw import draw
from hybrid.rollout.steps import Graphs

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
GROUPED = {**WIDE, "num_key_value_heads": 2}
# A window of 6 tokens is shorter than the longest prompt, and than every response.
MODELS = {
    "gpt2": {},
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6},
    "mistral": {**GROUPED, "max_position_embeddings": 64, "sliding_window": 6},
    "gemma3_text": {**GROUPED, "max_position_embeddings": 64, "head_dim": 8, "sliding_window": 6},
}


@pytest.fixture(scope="module", params=MODELS)
def backbone(request):
    return Backbone(tiny_model(request.param, **MODELS[request.param])).eval()


def drawn(backbone, seed=0, prompts=PROMPTS, **options):
    ids, mask = left_pad(prompts, pad_id=0)
    graphs, repeats = options.pop("graphs", None), options.pop("repeats", 1)
    config = SamplingConfig(**{"max_new_tokens": 12, "temperature": 1.5} | options)
    return sample(
        backbone, ids, mask, config, eos_ids=[EOS], repeats=repeats, graphs=graphs,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def plainly(backbone, repeats=1, seed=0):
    """The same responses by one forward over all tokens for each, without a cache: (ids, mask, log-probs), lists."""
    rows = [prompt for prompt in PROMPTS for _ in range(repeats)]
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(12, len(rows), dtype=torch.float64, generator=generator)
    responses = []
    for row, prompt in enumerate(rows):
        ids, logprobs = [], []
        while len(ids) < 12 and EOS not in ids:
            with torch.no_grad():
                whole = torch.tensor([prompt + ids])
                logits = backbone.logits(backbone(whole, torch.ones_like(whole))[:, -1])
            token, logprob = draw(logits, uniform[len(ids), row : row + 1], temperature=1.5)
            ids.append(int(token))
            logprobs.append(float(logprob))
        responses.append((ids, logprobs))
    return responses


def assert_are(answer, expected):
    assert [ids[mask].tolist() for ids, mask in zip(answer.ids, answer.mask, strict=True)] == [x for x, _ in expected]
    for logprob, mask, (_, wanted) in zip(answer.logprob, answer.mask, expected, strict=True):
        torch.testing.assert_close(logprob[mask], torch.tensor(wanted), rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_cached_steps_draw_what_a_forward_over_all_tokens_draws(backbone, fixed, repeats):
    graphs = Graphs(captures=False) if fixed else None
    assert_are(drawn(backbone, graphs=graphs, repeats=repeats), plainly(backbone, repeats))


def test_fixed_steps_are_really_taken(backbone):
    graphs = Graphs(captures=False)
    drawn(backbone, graphs=graphs)
    ((_, steps),) = graphs._known.items()
    assert steps.calls == 11


def test_the_steps_of_one_rollout_serve_the_next(backbone):
    graphs = Graphs(captures=False)
    drawn(backbone, seed=5, graphs=graphs, prompts=[[20, 21], [22, 23, 24, 25], [26]])
    assert_are(drawn(backbone, graphs=graphs), plainly(backbone))
    assert len(graphs._known) == 1


def test_steps_see_new_weights(backbone):
    graphs = Graphs(captures=False)
    drawn(backbone, graphs=graphs)
    weight = backbone.trunk.get_input_embeddings().weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.5)
        assert_are(drawn(backbone, graphs=graphs), plainly(backbone))
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_other_sampling_takes_other_steps(backbone):
    graphs = Graphs(captures=False, keep=2)
    for top_k in (0, 1, 2, 3):
        answer = drawn(backbone, graphs=graphs, top_k=top_k, min_new_tokens=3)
        expected = drawn(backbone, top_k=top_k, min_new_tokens=3)
        assert torch.equal(answer.ids, expected.ids)
    assert len(graphs._known) == 2


def test_a_model_whose_cache_is_a_state_decodes_by_it():
    mamba = Backbone(
        tiny_model("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, **FAMILIES.get("mamba", {}))
    )
    assert not takes_fixed_cache(mamba.eval())
    graphs = Graphs(captures=False)
    for repeats in (1, 2):
        assert_are(drawn(mamba, graphs=graphs, repeats=repeats), plainly(mamba, repeats))


@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_models_state_is_repeated_and_the_prompts_are_read_once(cell, monkeypatch):
    backbone, read = Backbone(tiny_model(cell)).eval(), []
    assert not takes_fixed_cache(backbone)
    next_logits = Backbone.next_logits
    for repeats in (1, 3):
        expected = plainly(backbone, repeats)
        with monkeypatch.context() as patch:
            patch.setattr(Backbone, "next_logits", lambda self, *a: (read.append(a[0].shape), next_logits(self, *a))[1])
            assert_are(drawn(backbone, repeats=repeats), expected)
    assert read.count((3, 7)) == 2


def test_a_fixed_cache_that_gives_something_else_is_not_taken(monkeypatch):
    from hybrid.models import cache

    llama = Backbone(tiny_model("llama")).eval()
    assert takes_fixed_cache(llama)
    # As if the mask let through what is not written yet.
    monkeypatch.setattr(cache._FixedLayer, "is_compileable", False)
    monkeypatch.setattr(cache, "_memory", lambda x, room, n: x.new_ones(x.shape[0] * n, x.shape[1], room, x.shape[3]))
    assert not takes_fixed_cache(llama)
