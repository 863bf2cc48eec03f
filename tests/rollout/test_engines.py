"""The engines by their interface; vLLM's with a stand-in for the package, which test_vllm.py runs for real."""

import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_policy

from hybrid import HybridConfig, InputError, PPOConfig, SamplingConfig
from hybrid.core import Encoded, RunStopped
from hybrid.data import left_pad
from hybrid.models import LoraConfig, Policy, add_lora
from hybrid.rollout import RolloutConfig, TorchEngine, VLLMEngine, make_engine, respond
from hybrid.rollout.engine import find_spec

PROMPTS = [[5, 6, 7], [8]]
ANSWERS = [[11, 12, 2], [13, 14, 15, 16], [2], [17, 18]]


class FakeLLM:
    """Answers with what stands in `answers`, at log-prob -token / 10, and keeps what it was asked."""

    answers = ANSWERS
    failure = None

    def __init__(self, folder, **options):
        self.options, self.pushed, self.num_resets = options, [], 0
        torch.rand(1), random.random(), np.random.rand()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.pushed.append({name: x.clone() for name, x in kwargs["weights_iterator"]})

    def reset_prefix_cache(self):
        self.num_resets += 1

    def generate(self, prompts, params, use_tqdm):
        torch.rand(1)
        if self.failure is not None:
            raise self.failure
        self.prompts, self.params = prompts, params
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=ids,
                        logprobs=[{token: SimpleNamespace(logprob=-token / 10)} for token in ids],
                        finish_reason="stop",
                    )
                ]
            )
            for ids in self.answers
        ]


@pytest.fixture
def fake(monkeypatch):
    """A package `vllm` that is one."""
    package = ModuleType("vllm")
    package.__spec__ = ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = type("LLM", (FakeLLM,), {}), lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", package)
    return package


def drawn(engine, sampling=None, seed=0, **options):
    ids, mask = left_pad(PROMPTS, pad_id=0)
    generator = torch.Generator().manual_seed(seed)
    options = {"eos_ids": [2], "pad_id": 3, "repeats": 2, "generator": generator} | options
    return engine.generate(ids, mask, sampling or SamplingConfig(max_new_tokens=4), **options)


def test_the_config_names_the_engine(fake):
    policy = tiny_policy()
    assert isinstance(make_engine(policy), TorchEngine)
    assert isinstance(make_engine(policy, RolloutConfig(engine="vllm")), VLLMEngine)


def test_new_weights_are_what_the_torch_engine_draws_from():
    one, other = Policy(tiny_model(seed=0)), Policy(tiny_model(seed=1))
    engine = TorchEngine(one)
    before = drawn(engine)
    engine.update(other.backbone.model.state_dict())
    assert torch.equal(drawn(engine).ids, drawn(TorchEngine(other)).ids)
    assert not torch.equal(drawn(engine).ids, before.ids)


def test_a_request_says_all_that_the_sampling_does(fake):
    engine = VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm"))
    how = SamplingConfig(max_new_tokens=4, min_new_tokens=1, temperature=0.7, top_k=5, top_p=0.9)
    drawn(engine, how, eos_ids=[7, 2], limit=3)
    llm = engine._llm
    assert [prompt["prompt_token_ids"] for prompt in llm.prompts] == [[5, 6, 7], [5, 6, 7], [8], [8]]
    asked = {"max_tokens": 3, "min_tokens": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "stop_token_ids": [2, 7]}
    assert all(params.items() >= asked.items() for params in llm.params)
    assert len({params["seed"] for params in llm.params}) == 4
    assert llm.options["logprobs_mode"] == "processed_logprobs"


def test_seeds_come_of_the_generator_alone(fake):
    engine, seeds = VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")), []
    for seed in (0, 0, 1):
        drawn(engine, seed=seed)
        seeds.append([params["seed"] for params in engine._llm.params])
    assert seeds[0] == seeds[1] != seeds[2]


def test_answers_become_responses(fake):
    found = drawn(VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")))
    assert found.ids.tolist() == [[11, 12, 2, 3], [13, 14, 15, 16], [2, 3, 3, 3], [17, 18, 3, 3]]
    assert found.lists() == ANSWERS
    assert found.ended.tolist() == [True, False, True, False]
    expected = torch.tensor([[1.1, 1.2, 0.2, 0], [1.3, 1.4, 1.5, 1.6], [0.2, 0, 0, 0], [1.7, 1.8, 0, 0]])
    assert torch.allclose(found.logprob, -expected)


def test_a_response_ends_where_it_is_over_and_what_stands_behind_is_dropped(fake):
    found = drawn(VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")), is_over=lambda ids: ids[-1] in (14, 18))
    assert found.lists() == [[11, 12, 2], [13, 14], [2], [17, 18]]
    assert found.ended.tolist() == [True, True, True, True]
    assert found.logprob.shape == (4, 3)


def test_of_the_likeliest_tokens_the_logprobs_are_zero(fake):
    found = drawn(VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")), SamplingConfig(temperature=0))
    assert not found.logprob.any()


def test_weights_are_given_when_they_have_changed_and_only_then(fake):
    policy = tiny_policy()
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm"))
    weight = policy.backbone.model.get_output_embeddings().weight
    drawn(engine)
    drawn(engine)
    pushed = engine._llm.pushed
    assert len(pushed) == 1
    assert pushed[0].keys() == policy.backbone.model.state_dict().keys()
    weight.data[3, 4] += 1e-6  # past autograd's count of versions, as some optimizers write
    drawn(engine)
    assert len(pushed) == 2
    assert torch.equal(pushed[1]["lm_head.weight"], weight)
    torch.nn.init.ones_(policy.value_head.linear.weight)
    drawn(engine)
    assert len(pushed) == 2
    assert engine._llm.num_resets == 4


@pytest.mark.usefixtures("needs_peft")
def test_an_adapter_is_merged_into_what_is_given(fake):
    policy = tiny_policy()
    plain = {name: x.clone() for name, x in policy.backbone.model.state_dict().items()}
    add_lora(policy.backbone.model, LoraConfig(rank=2, target_modules=("q_proj",)))
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm"))
    for name, x in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(x)
    drawn(engine)
    (given,) = engine._llm.pushed
    assert given.keys() == plain.keys()
    changed = {name for name, x in given.items() if not torch.equal(x, plain[name])}
    assert changed == {name for name in plain if "q_proj" in name}


def test_only_ids_that_the_tokenizer_has_are_allowed(fake, tokenizer):
    policy = Policy(tiny_model(vocab_size=100))
    engine = VLLMEngine(policy, RolloutConfig(engine="vllm"))
    drawn(engine)
    assert engine._llm.params[0]["allowed_token_ids"] is None
    policy.backbone.fit_vocabulary(tokenizer)
    drawn(engine)
    assert engine._llm.params[0]["allowed_token_ids"] == list(range(97))


def test_the_streams_of_chance_stay_as_they_were(fake):
    engine = VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm"))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    drawn(engine)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_what_fails_in_vllm_says_so_and_how_to_go_on(fake):
    fake.LLM.failure = ValueError("EngineCore died\nand more")
    with pytest.raises(RunStopped, match=r"drawing responses: ValueError: EngineCore died\. The run can be"):
        drawn(VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")))


@pytest.mark.parametrize(("answers", "message"), [([[5], []], "drew nothing"), ([[5], [np.nan]], "not finite")])
def test_answers_that_are_none_stop_the_run(fake, answers, message):
    fake.LLM.answers = answers
    with pytest.raises(RunStopped, match=message):
        drawn(VLLMEngine(tiny_policy(), RolloutConfig(engine="vllm")), repeats=1)


def test_what_vllm_cannot_do_is_refused_by_name(fake, tokenizer):
    config, policy = RolloutConfig(engine="vllm"), tiny_policy()
    with pytest.raises(InputError, match=r"decoder 'markov'.*rollout.engine=torch"):
        config.check_sampling(SamplingConfig(decoder={"type": "markov", "window": 3}))
    with pytest.raises(InputError, match=r"at least 0.01, got 0.001"):
        config.check_sampling(SamplingConfig(temperature=0.001))
    example = Encoded((5, 6), (-100, -100), (5, 6), "", "", {})
    with pytest.raises(InputError, match="decoder 'best_of_n'"):
        respond(
            VLLMEngine(policy, config), [example], tokenizer=tokenizer,
            sampling=SamplingConfig(decoder={"type": "best_of_n", "by": "value"}),
        )  # fmt: skip
    with pytest.raises(InputError, match="only draws whole responses"):
        drawn(VLLMEngine(policy, config), begun=drawn(TorchEngine(policy)))
    with pytest.raises(InputError, match=r"rollout.vllm.logprobs_mode cannot be set"):
        RolloutConfig(engine="vllm", vllm={"logprobs_mode": "raw_logits"})


def test_a_config_that_names_no_engine_there_is_is_refused():
    with pytest.raises(InputError, match=r"unknown rollout.engine 'vlm'; did you mean 'vllm'"):
        RolloutConfig(engine="vlm")
    with pytest.raises(InputError, match=r"rollout.vllm means nothing with rollout.engine 'torch'"):
        RolloutConfig(vllm={"dtype": "bfloat16"})


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install():
    with pytest.raises(InputError, match=r"pip install 'hybrid-trainer\[vllm\]'"):
        HybridConfig.from_dict({"rollout": {"engine": "vllm"}})


def test_with_vllm_ppo_corrects_for_the_difference_unless_told_how(fake):
    rollout = RolloutConfig(engine="vllm")
    assert HybridConfig().ppo.importance is None
    assert HybridConfig(rollout=rollout).ppo.importance == "token"
    assert HybridConfig(rollout=rollout, ppo=PPOConfig(importance="sequence")).ppo.importance == "sequence"
