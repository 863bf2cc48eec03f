"""What tests of preferences share: a tiny trainer on pairs, and plain sums of log-probs to hold it against."""

import torch
from tiny import tiny_model

from hybrid import DataConfig, HybridConfig, HybridTrainer, Policy, PPOConfig, SamplingConfig
from hybrid.core import IGNORE
from hybrid.evaluate import EvalConfig
from hybrid.objectives import PreferencesConfig

PAIRS = [
    {"prompt": f"the w{i} w{i + 1}", "chosen": "was good " * (1 + i % 3) + f"w{i}", "rejected": f"was bad w{i + 2}"}
    for i in range(6)
]


def trainer_on(tokenizer, rows=PAIRS, *, model=None, reward=None, cache=False, given=None, **sections):
    """A trainer whose training data are the rows; SGD of rate 0.1 on a tiny llama that is always the same."""
    defaults = {
        "data": DataConfig(template="none", shuffle=False),
        "preferences": PreferencesConfig(batch_size=4, cache_reference=cache),
        "sampling": SamplingConfig(max_new_tokens=5),
        "ppo": PPOConfig(batch_size=3, minibatch_size=6, epochs=1, samples_per_prompt=2),
        "eval": EvalConfig(num_prompts=2),
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    config = HybridConfig(**defaults | sections)
    policy = Policy(tiny_model(seed=1) if model is None else model)
    return HybridTrainer(policy, tokenizer, rows, reward, config, **(given or {}))


def summed(model, encoded, *, mean=False):
    """Of one answer under a plain transformers model, float64: the sum (or mean) of its trained tokens' log-probs."""
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        logprob = model(ids).logits.double().log_softmax(-1)
    found = [logprob[0, t - 1, token] for t, token in enumerate(encoded.labels) if token != IGNORE]
    return float(sum(found)) / (len(found) if mean else 1)
