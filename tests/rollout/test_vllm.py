"""vLLM for real: `make vllm-test`. Small random Llamas, whose heads have 64 numbers, as its CPU build asks."""

import json
from importlib.util import find_spec

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, InputError, Policy, SamplingConfig
from hybrid.core import RunStopped
from hybrid.data import left_pad
from hybrid.models import LoraConfig, add_lora, response_stats
from hybrid.rollout import RolloutConfig, VLLMEngine
from hybrid.run import CHECKPOINTS, read_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-test"),
]

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
VLLM = {"gpu_memory_utilization": 0.2}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def wide_policy(**overrides):
    return Policy(tiny_model(**WIDE | overrides)).eval()


@pytest.fixture(scope="module")
def engine():
    """One for the tests that leave its policy as it is."""
    made = VLLMEngine(wide_policy(), RolloutConfig(engine="vllm", vllm=VLLM))
    yield made
    made.close()


def drawn(engine, *, seed=0, prompts=PROMPTS, repeats=2, is_over=None, **sampling):
    ids, mask = left_pad(prompts, pad_id=0)
    how = SamplingConfig(**{"max_new_tokens": 24} | sampling)
    found = engine.generate(
        ids, mask, how, eos_ids=[2], repeats=repeats, generator=torch.Generator().manual_seed(seed), is_over=is_over
    )
    return ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0), found


@torch.no_grad()
def gap(policy, answered, temperature=1.0):
    """The largest difference of a log-prob from that of our forward, nats."""
    prompt_ids, prompt_mask, found = answered
    ids, mask = torch.cat([prompt_ids, found.ids], 1), torch.cat([prompt_mask, found.mask], 1)
    hidden = policy.backbone(ids, mask)
    stats = response_stats(policy.backbone, hidden, ids, found.mask, temperature=temperature)
    return float((stats.logprob - found.logprob).abs().max())


def step(policy, scale=0.02):
    """Other weights, as an update leaves them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.backbone.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_are_those_of_our_forward_before_and_after_an_update(tied, monkeypatch):
    policy = wide_policy(tie_word_embeddings=tied)
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm", vllm=VLLM))
    assert gap(policy, drawn(engine)) < 1e-4
    step(policy)
    # The control: with the weights that it had before, the difference shows.
    with monkeypatch.context() as patch:
        patch.setattr(engine, "update", lambda state: None)
        assert gap(policy, drawn(engine)) > 0.1
    engine._given = None
    assert gap(policy, drawn(engine)) < 1e-4
    engine.close()


@pytest.mark.usefixtures("needs_peft")
def test_an_adapter_is_drawn_with():
    policy = wide_policy()
    add_lora(policy.backbone.model, LoraConfig(rank=4))
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm", vllm=VLLM))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert gap(policy, drawn(engine)) < 1e-4
    engine.close()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_have_the_temperature_that_was_drawn_with(engine, temperature):
    assert gap(engine.policy, drawn(engine, temperature=temperature), temperature) < 1e-4


def test_the_same_seed_draws_the_same_and_another_another(engine):
    one, same, other = (drawn(engine, seed=seed)[2] for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.logprob, same.logprob)
    assert one.lists() != other.lists()


def test_tokens_come_as_often_as_their_logprobs_say(engine):
    """Chi-squared of the first token, over those that are expected 5 times and the rest as one."""
    times = 4000
    ids, mask, found = drawn(engine, prompts=[[5, 6]], repeats=times, max_new_tokens=1)
    with torch.no_grad():
        hidden = engine.policy.backbone(ids[:1], mask[:1])
        expected = times * engine.policy.backbone.logits(hidden[:, -1]).double().softmax(-1).squeeze(0)
    counts = torch.bincount(found.ids.squeeze(1), minlength=97).double()
    often = expected >= 5
    both = [torch.cat([x[often], x[~often].sum().view(1)]) for x in (counts, expected)]
    chi2, freedom = float(((both[0] - both[1]) ** 2 / both[1]).sum()), len(both[0]) - 1
    # Four standard deviations of a chi-squared.
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_truncated_draws_bring_the_logprobs_of_what_they_were_drawn_from(engine):
    _, _, found = drawn(engine, top_k=1)
    assert float(found.logprob.abs().max()) < 1e-6
    _, _, found = drawn(engine, min_new_tokens=24)
    assert found.lengths.tolist() == [24] * 6


def test_the_likeliest_tokens_are_those_of_our_sampler(engine):
    from hybrid.rollout import TorchEngine

    _, _, ours = drawn(TorchEngine(engine.policy), temperature=0)
    assert drawn(engine, temperature=0)[2].lists() == ours.lists()


def test_a_stop_rule_ends_a_response(engine):
    _, _, whole = drawn(engine)
    _, _, cut = drawn(engine, is_over=lambda ids: len(ids) == 3)
    assert cut.lists() == [row[:3] for row in whole.lists()]
    assert cut.ended.all()


def test_a_padded_vocabulary_is_not_drawn_from(tokenizer):
    policy = wide_policy(vocab_size=128)
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm", vllm=VLLM))
    assert int(drawn(engine, temperature=2.0)[2].ids.max()) >= 97
    policy.backbone.fit_vocabulary(tokenizer)
    answered = drawn(engine, temperature=2.0)
    assert int(answered[2].ids.max()) < 97
    assert gap(policy, answered, 2.0) < 1e-4
    engine.close()


def config(tmp_path, tokenizer, name="run", **sections):
    """A run whose model has no word for how it is, at first."""
    model = tmp_path / "model"
    if not model.is_dir():
        Policy(tiny_model(**WIDE, std=0.05)).save_pretrained(model, tokenizer=tokenizer)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{i} is", "target": "good"}) + "\n" for i in range(16)))
    values = {
        "model": {"name": str(model)},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "reward": {"type": "sentiment_lexicon"},
        "sampling": {"max_new_tokens": 8},
        "rollout": {"engine": "vllm", "vllm": VLLM},
        "mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 12},
        "optimizer": {"lr": 3e-3},
        "ppo": {"batch_size": 12, "samples_per_prompt": 4, "minibatch_size": 24, "epochs": 2},
        "eval": {"num_prompts": 4},
        "checkpoint": {"every": 2},
        "run": {"output": str(tmp_path / name)},
    }
    return HybridConfig.from_dict(values | sections)


def test_a_whole_ppo_run_learns(tmp_path, tokenizer):
    trainer = HybridTrainer(config=config(tmp_path, tokenizer))
    trainer.train()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] != "eval"]
    assert rows[0]["reward"] < 0.1
    assert rows[-1]["reward"] > 0.5
    assert all(row["sampling_gap_max"] < 1e-4 for row in rows), "the weights of every update were drawn from"


def test_a_run_whose_engine_crashed_goes_on_as_if_it_had_not(tmp_path, tokenizer):
    short = {"mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 4}}
    whole = HybridTrainer(config=config(tmp_path, tokenizer, "whole", **short))
    whole.train()
    part = HybridTrainer(config=config(tmp_path, tokenizer, "part", **short))
    rollout = part.rollout

    def crashing(*arguments, **options):
        if part.num_steps == 4:
            part.engine._llm.generate = None
        return rollout(*arguments, **options)

    part.rollout = crashing
    with pytest.raises(RunStopped, match=r"rollout.engine=vllm failed while drawing responses") as raised:
        part.train()
    assert "step-2" in "".join(raised.value.__notes__)
    resumed = HybridTrainer.resume(tmp_path / "part")
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


def test_models_that_vllm_does_not_run_are_refused_before_they_are_loaded(tmp_path, tokenizer):
    for what, model in (("RecurrentForCausalLM", tiny_model("lstm")), ("this model's have 8", tiny_model())):
        if what != "RecurrentForCausalLM" and torch.cuda.is_available():
            continue
        folder = tmp_path / what.split()[-1]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=what):
            HybridTrainer(str(folder), config=HybridConfig(rollout=RolloutConfig(engine="vllm")))


def test_engines_may_be_changed_where_a_run_is_resumed(tmp_path, tokenizer):
    short = {"mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 4}}
    crash(HybridTrainer(config=config(tmp_path, tokenizer, **short)), 3)
    assert (tmp_path / "run" / CHECKPOINTS / "step-2").is_dir()
    resumed = HybridTrainer.resume(tmp_path / "run", ["rollout.engine=torch", "rollout.vllm={}"])
    resumed.train()
    assert resumed.num_steps == 4
