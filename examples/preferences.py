"""DPO by hand: your pairs, your loop, a plain torch optimizer, the pieces of `hybrid`.  preferences.py MODEL"""

import sys

import torch
from transformers import AutoTokenizer

import hybrid
from hybrid.data import DataConfig, encode_all
from hybrid.functional import dpo_loss

ROWS = [
    {"prompt": f"The {what} was", "chosen": f" a good {what}.", "rejected": f" a bad {what}."}
    for what in ("dog", "cat", "tree", "girl", "boy", "cake", "day", "park")
]


def main(model: str, steps: int = 8) -> None:
    torch.manual_seed(0)
    tokenizer, policy = AutoTokenizer.from_pretrained(model), hybrid.Policy.from_pretrained(model).eval()
    reference = hybrid.Reference.from_policy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    config = DataConfig(template="none")
    examples = encode_all(hybrid.read_pairs(ROWS, config), tokenizer, config)

    for _, pairs in zip(range(steps), hybrid.PairLoader(examples, batch_size=4, seed=0, pad_id=0), strict=False):
        logprob, _ = policy.batch_logprob(pairs.sides)  # both sides in one forward, (2B, T-1)
        ref_logprob, _ = reference.batch_logprob(pairs.sides)
        loss, metrics = dpo_loss(*pairs.split(logprob.sum(1)), *pairs.split(ref_logprob.sum(1)), beta=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"DPO loss {loss:.4f}  accuracy {metrics['accuracy']:.2f}  margin {metrics['margin_mean']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
