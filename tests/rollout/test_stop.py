"""Stop strings end a response like EOS, over token borders."""

import pytest
import torch
from tiny import tiny_model

from hybrid import HybridConfig, HybridTrainer
from hybrid.rollout import SamplingConfig
from hybrid.rollout.sample import sample
from hybrid.rollout.stop import before_stop, stop_rule


class Scripted:
    """A backbone that says the same words in every row."""

    def __init__(self, words, size):
        self.words, self.size = words, size

    def next_logits(self, ids, mask, cache=None, position_ids=None):
        position = 0 if cache is None else cache
        logits = torch.full((len(ids), self.size), -40.0)
        logits[:, self.words[position]] = 40.0
        return logits, position + 1


def said(tokenizer, text, stop, **config):
    words = tokenizer(text)["input_ids"]
    prompt = torch.tensor([[3], [3]])
    sampling = SamplingConfig(max_new_tokens=len(words), stop=stop, **config)
    return sample(
        Scripted(words, 97), prompt, torch.ones_like(prompt), sampling, eos_ids=[2], is_over=stop_rule(tokenizer, stop)
    )


def test_a_response_ends_with_the_token_that_completes_a_stop_string(tokenizer):
    # "is g" begins in one token and ends in the middle of the next.
    responses = said(tokenizer, "it is good and fine", ("is g",))
    assert responses.mask.sum(1).tolist() == [3, 3]
    assert responses.ended.tolist() == [True, True]
    assert responses.ids.shape[1] == 3


def test_a_response_without_a_stop_string_goes_on(tokenizer):
    responses = said(tokenizer, "it is good", ("bad",))
    assert responses.mask.sum(1).tolist() == [3, 3] and not responses.ended.any()


def test_the_prompt_is_not_searched(tokenizer):
    words = tokenizer("good bad")["input_ids"]
    prompt = torch.tensor([[tokenizer("fine")["input_ids"][0]]])
    sampling = SamplingConfig(max_new_tokens=2, stop=("fine",))
    rule = stop_rule(tokenizer, ("fine",))
    assert sample(Scripted(words, 97), prompt, torch.ones_like(prompt), sampling, eos_ids=[2], is_over=rule).mask.all()


@pytest.mark.parametrize(
    ("text", "begin", "left"), [("a b c", 0, "a "), ("b a", 0, ""), ("b b", 1, "b "), ("a", 0, "a"), ("c b", 0, "")]
)
def test_rewards_read_what_stands_before_the_stop_string(text, begin, left):
    assert before_stop(text, ("b", "c b"), begin) == left


@pytest.mark.parametrize("stop", ["text", ("",), (3,)])
def test_a_stop_that_is_no_list_of_texts_is_refused(stop):
    with pytest.raises(ValueError, match=r"SamplingConfig\.stop must be a list of texts"):
        SamplingConfig(stop=stop)


def test_a_trainer_stops_scores_and_trains_alike(tokenizer):
    seen = []
    config = HybridConfig.from_dict(
        {
            "sampling": {"max_new_tokens": 30, "stop": ["good", "w3"]},
            "ppo": {"batch_size": 8, "minibatch_size": 8},
            "data": {"template": "none"},
        }
    )
    reward = lambda response: float(seen.append(response) or len(response))  # noqa: E731
    trainer = HybridTrainer(tiny_model("llama"), tokenizer, [{"prompt": "it is"}] * 8, reward, config)
    rollout = trainer.rollout(["it is"] * 8)
    stopped = [text for text, ended in zip(rollout.responses, rollout.ended.tolist(), strict=True) if ended]
    assert stopped and all("good" not in text and "w3" not in text for text in seen)
    metrics = trainer.ppo_step(rollout)
    assert metrics["sampling_gap"] < 1e-4 and metrics["eos_share"] == len(stopped) / 8
