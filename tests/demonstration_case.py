"""A trainer whose prompts have demonstrations, its rollouts, and their rows under a plain model in float64."""

from dataclasses import replace

import torch
from tiny import tiny_model

from hybrid import HybridConfig, HybridTrainer, Policy
from hybrid.objectives import with_advantages

ROWS = [
    {"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i} w{i + 1} w{i + 2}"[: 8 + 6 * (i % 2)]} for i in range(6)
]
OF = {"strategy": "objective", "steps": 2}
GOOD = ("was good", "was go")


def score(response, prompt):
    """1 of a demonstration; of a response 0 or 1, and of the prompts of w0 and w2 always 0."""
    if response.startswith(GOOD):
        return 1.0
    return 0.0 if prompt.split()[1] in ("w0", "w2") else float(sum(map(ord, response)) % 2)


def trainer_of(tokenizer, rows=ROWS, reward=score, objectives=None, mixing=None, **ppo):
    settings = {"batch_size": 4, "samples_per_prompt": 3, "minibatch_size": 12, "epochs": 1, "advantage": "group"}
    config = HybridConfig.from_dict(
        {
            "data": {"template": "none", "shuffle": False},
            "sampling": {"max_new_tokens": 6, "temperature": 1.3},
            "ppo": {**settings, **ppo},
            "kl": {"coef": 0.0},
            "objectives": objectives or {},
            "mixing": mixing or {"strategy": "objective", "objective": "luffy", "steps": 2},
            "optimizer": {"lr": 1e-2},
        }
    )
    return HybridTrainer(Policy(tiny_model(seed=1)), tokenizer, rows, reward, config)


class Plain:
    """The rows of a rollout under a plain transformers model: lists of log-probs and entropies of their own tokens."""

    def __init__(self, trainer, rollout):
        self.rows = []
        for row in range(len(rollout)):
            ids = rollout.input_ids[row][rollout.attention_mask[row].bool()]
            own = rollout.mask[row, : len(ids) - int(rollout.attention_mask[row, : rollout.prompt_length].sum())]
            place = own.nonzero().squeeze(1) + len(ids) - len(own)
            with torch.no_grad():
                logits = trainer.policy.backbone.model(ids.unsqueeze(0)).logits[0].double() / 1.3
            logprob = logits.log_softmax(-1)[place - 1]
            entropy = (-logprob.exp() * logprob).sum(-1).tolist()
            self.rows.append(([logprob[i, token].item() for i, token in enumerate(ids[place].tolist())], entropy))


def rolled(trainer, name, examples=None):
    """(the rollout, what the objective learns from)."""
    rollout = trainer.rollout(trainer.corpus.train[:4] if examples is None else examples, repeated=examples is not None)
    return rollout, trainer.objectives[name].learnt(with_advantages(rollout, trainer.config.ppo))


def loss_of(trainer, name, rows):
    term = trainer.objectives[name].term(rows)
    return float(term.loss_of(term.rows)[0].detach())


def standardised(scores):
    """The advantage of each score of a group."""
    x = torch.tensor(scores, dtype=torch.float64)
    return ((x - x.mean()) / (x.std() + 1e-4)).tolist()


def advantages(rows):
    """Of each row, by a loop over its group."""
    found = [0.0] * len(rows)
    for group in set(rows.group.tolist()):
        members = [i for i, g in enumerate(rows.group.tolist()) if g == group]
        for i, a in zip(members, standardised([rows.score[i].item() for i in members]), strict=True):
            found[i] = a
    return found


def prefixed(trainer, hints):
    """For each prompt two responses without a hint and one with so many tokens."""
    rows = []
    for example, hint in zip(trainer.corpus.train, hints, strict=False):
        cut = example.input_ids[: len(example.prompt_ids) + hint]
        rows += [example, example, replace(example, prompt_ids=cut, num_hint=hint)]
    return rows
