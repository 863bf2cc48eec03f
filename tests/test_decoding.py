"""Decoders in runs: who may learn from which, where their metrics go, and the command line."""

import json
from dataclasses import dataclass

import pytest
import torch
from tiny import tiny_model, tiny_policy
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.mixing import make_strategy
from hybrid.rollout import Decoder, SamplingConfig, decoder_names, register_decoder

ROWS = [{"prompt": "the movie was", "target": "good"}, {"prompt": "it is", "target": "fine"}]
BASE = {
    "sampling": {"max_new_tokens": 6},
    "ppo": {"batch_size": 2, "minibatch_size": 2, "epochs": 1},
    "data": {"template": "none"},
    "eval": {"num_prompts": 2},
}
SEARCHES = [
    {"type": "best_of_n", "n": 3},
    {"type": "reward_guided", "n": 3, "block": 2},
    {"type": "mcmc", "target": "tilted", "steps": 2},
    {"type": "smc", "n": 3, "block": 2},
    {"type": "value_guided", "width": 2, "branch": 3},
    {"type": "ppo_mcts", "simulations": 3},
]
RAFT = {"ppo": {"samples_per_prompt": 2}, "mixing": {"strategy": "objective", "objective": "raft", "steps": 1}}


def num_letters(response):
    return float(len(response))


def config_of(**sections):
    return HybridConfig.from_dict({key: {**BASE.get(key, {}), **sections.get(key, {})} for key in {*BASE, *sections}})


def trainer(tokenizer, reward=num_letters, model=None, **sections):
    return HybridTrainer(model or tiny_policy(), tokenizer, ROWS, reward, config_of(**sections), eval_data=ROWS)


def by(decoder):
    return {"sampling": {"max_new_tokens": 6, "decoder": decoder}}


def ids(spec):
    return spec["type"]


@pytest.mark.parametrize("decoder", SEARCHES, ids=ids)
def test_ppo_refuses_before_a_model_is_loaded_what_is_no_policy(decoder):
    config = config_of(reward={"type": "sentiment_lexicon"}, **by(decoder))
    with pytest.raises(InputError, match=f"objective 'ppo' cannot learn from .* decoder '{decoder['type']}'.*raft"):
        config.check_training(make_strategy(config.mixing))


@pytest.mark.parametrize("decoder", SEARCHES, ids=ids)
def test_ppo_refuses_a_rollout_by_hand_before_it_is_drawn(tokenizer, decoder, monkeypatch):
    hybrid = trainer(tokenizer, **by(decoder))
    monkeypatch.setattr(hybrid.engine, "generate", None)
    with pytest.raises(InputError, match="objective 'ppo' cannot learn"):
        hybrid.rollout(ROWS)


@pytest.mark.parametrize("decoder", SEARCHES, ids=ids)
def test_raft_imitates_what_any_decoder_finds_and_ppo_does_not(tokenizer, decoder):
    hybrid = trainer(tokenizer, **RAFT, **by(decoder))
    rollout = hybrid.rollout(ROWS)
    assert len(rollout) == 4
    assert rollout.decoder == decoder["type"]
    assert rollout.sampling_logprob is None
    assert rollout.reward_metrics["decoder/tokens"] >= rollout.mask.sum() / 4
    metrics = hybrid.rollout_step(rollout, {"raft": 1.0})
    assert metrics["decoder/tokens"] == rollout.reward_metrics["decoder/tokens"]
    with pytest.raises(InputError, match="objective 'ppo' cannot learn"):
        hybrid.ppo_step(rollout)


def test_raft_of_one_response_needs_a_search_to_choose(tokenizer):
    one = {"mixing": RAFT["mixing"]}
    trainer(tokenizer, **one, **by(SEARCHES[0])).train()
    with pytest.raises(InputError, match=r"imitates the best 1 of ppo\.samples_per_prompt = 1"):
        trainer(tokenizer, **one).train()


def test_markov_trains_with_ppo_and_raft_and_not_with_what_sees_everything(tokenizer):
    decoder = {"type": "markov", "window": 3}
    hybrid = trainer(tokenizer, **by(decoder))
    metrics = hybrid.ppo_step(hybrid.rollout(ROWS))
    assert 0 <= metrics["sampling_gap_max"] < 1e-4
    assert metrics["ratio_max"] == 1.0  # one epoch of one minibatch
    trainer(tokenizer, **RAFT, **by(decoder)).train()
    config = config_of(
        reward={"type": "sentiment_lexicon"},
        mixing={"strategy": "objective", "objective": "online_dpo", "steps": 1}, **by(decoder),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"'online_dpo' sees all tokens.*window of 3.*ppo, raft"):
        config.check_training(make_strategy(config.mixing))


def test_a_sampler_with_another_window_than_the_training_stops_the_run(tokenizer, monkeypatch):
    from hybrid.core import RunStopped
    from hybrid.rollout.decoders.markov import _WindowSteps

    hybrid = trainer(tokenizer, **by({"type": "markov", "window": 3}))
    right = _WindowSteps.__init__
    monkeypatch.setattr(_WindowSteps, "__init__", lambda self, *args: right(self, *args[:-1], 2))
    with pytest.raises(RunStopped, match="sampling_gap"):
        hybrid.rollout(ROWS)


@pytest.mark.parametrize("decoder", SEARCHES, ids=ids)
def test_evaluation_takes_a_decoder_of_its_own(tokenizer, decoder):
    hybrid = trainer(tokenizer, eval={"num_prompts": 2, "decoder": decoder})
    metrics = hybrid.evaluate()
    assert metrics["decoder/tokens"] > 0
    assert hybrid.rollout(ROWS).decoder == "sample"
    assert not any(name.startswith("decoder/") for name in trainer(tokenizer).evaluate())


def test_best_of_n_is_worth_more_than_a_sample(tokenizer):
    plain, best = (
        trainer(tokenizer, model=tiny_model("llama"), eval={"num_prompts": 2, "decoder": {"type": kind}}).evaluate()
        for kind in ("sample", "best_of_n")
    )
    assert best["reward"] > plain["reward"]
    assert best["decoder/kl_bound"] == pytest.approx(0.6363, abs=1e-4)


@pytest.mark.parametrize("decoder", SEARCHES[:4], ids=ids)
def test_without_a_reward_a_decoder_that_needs_one_is_refused_before_a_model_is_loaded(stories, decoder, monkeypatch):
    monkeypatch.setattr("hybrid.learner.build_models", None)
    for sections in (by(decoder), {"eval": {"decoder": decoder}}):
        with pytest.raises(InputError, match=f"decoder '{decoder['type']}' needs a reward.*sampling.decoder.reward"):
            HybridTrainer(stories, None, ROWS, None, config_of(**sections))


def test_a_window_longer_than_the_context_is_refused_before_the_model_is_loaded(stories, monkeypatch):
    monkeypatch.setattr("hybrid.learner.build_models", None)
    with pytest.raises(InputError, match=r"decoder\.window must be at most the model's context of 512 tokens, got 600"):
        HybridTrainer(stories, None, ROWS, num_letters, config_of(**by({"type": "markov", "window": 600})))


def test_a_decoder_judges_by_a_reward_of_its_own(tokenizer):
    own = {"type": "best_of_n", "n": 16, "reward": {"type": "length_window", "min": 1, "max": 1}}
    hybrid = trainer(tokenizer, reward=None, **by(own))
    assert len(hybrid.generate(["the movie"])) == 1


def test_the_candidates_leave_no_trace_in_the_reward(tokenizer):
    reward = {"type": "length_window", "min": 1, "max": 9, "postprocess": {"type": "ema_normalize"}}
    state = {}
    for n in (2, 8):
        hybrid = trainer(tokenizer, reward=reward, **RAFT, **by({"type": "best_of_n", "n": n}))
        before = str(hybrid.reward.state_dict())
        hybrid.generate(["the movie"])
        assert str(hybrid.reward.state_dict()) == before
        hybrid.rollout(ROWS)
        state[n] = hybrid.reward.state_dict()
    assert str(state[2]) != before


def test_a_reward_that_answers_itself_does_not_search_for_its_answers(tokenizer):
    play = {"type": "self_play", "reward": {"type": "python", "function": num_letters, "name": "letters"}}
    hybrid = trainer(tokenizer, reward=play, **RAFT, **by({"type": "best_of_n", "n": 4}))
    hybrid.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", [{"type": "markov", "window": 5}, {"type": "mcmc", "target": "tilted", "steps": 2}], ids=ids
)
def test_a_run_that_died_goes_on_bit_for_bit(stories, tmp_path, decoder):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Day {i} was", "target": "good"}) + "\n" for i in range(8)))

    def config(name):
        return config_of(
            model={"name": stories}, reward={"type": "sentiment_lexicon"}, **by(decoder),
            data={"train": str(data), "eval_fraction": 0.25, "template": "none"},
            mixing={"strategy": "objective", "objective": "ppo" if decoder["type"] == "markov" else "raft", "steps": 4},
            objectives={"raft": {"above": -1.0}}, checkpoint={"every": 1}, run={"output": str(tmp_path / name)},
        )  # fmt: skip

    whole = HybridTrainer(config=config("whole"))
    whole.train()
    crash(HybridTrainer(config=config("part")), 2)
    resumed = HybridTrainer.resume(tmp_path / "part")
    assert 0 < resumed.num_steps < 4
    resumed.train()
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))


def test_the_config_is_written_and_read_back():
    config = config_of(eval={"decoder": {"type": "smc"}}, **by({"type": "best_of_n", "n": 3}))
    assert HybridConfig.from_dict(config.written()) == config
    assert config.written()["sampling"]["decoder"] == {"type": "best_of_n", "n": 3}


def test_a_strangers_decoder_is_one_class(tokenizer):
    if "longest" not in decoder_names():

        @register_decoder("longest")
        @dataclass(frozen=True)
        class Longest(Decoder):
            n: int = 4

            def answers(self, asked):
                drawn = asked.drawn(self.n * asked.repeats)
                best = drawn.lengths.view(-1, self.n).argmax(1)
                return drawn.of(best + self.n * torch.arange(len(best)))

    hybrid = trainer(tokenizer, eval={"decoder": {"type": "longest", "n": 8}})
    assert hybrid.evaluate()["response_length"] >= trainer(tokenizer).evaluate()["response_length"]
    with pytest.raises(InputError, match="longest"):
        SamplingConfig(decoder={"type": "longst"})


def test_the_command_line_generates_by_a_decoder(stories, capsys):
    own = "sampling.decoder={type: best_of_n, n: 2, reward: {type: sentiment_lexicon}}"
    assert main(["generate", stories, "Once", "--set", own, "--set", "sampling.max_new_tokens=4"]) == 0
    assert "→" in capsys.readouterr().out
    assert main(["generate", stories, "Once", "--set", "sampling.decoder={type: best_of_n, n: 2}"]) == 2
    assert "needs a reward" in capsys.readouterr().err
