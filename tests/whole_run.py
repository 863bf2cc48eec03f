"""What tests of whole runs share: a run that dies, and what a run leaves behind."""

import pytest
import torch

from hybrid.run import read_jsonl


def crash(trainer, fatal_step):
    """Train, and die where the run would learn in its step `fatal_step`, counted from 1."""

    class Died(RuntimeError):
        pass

    take = trainer.take

    def dying(*args, **kwargs):
        if trainer.num_steps == fatal_step:
            raise Died
        return take(*args, **kwargs)

    trainer.take = dying
    with pytest.raises(Died):
        trainer.train()


def logged_rows(folder):
    """The rows of the run's log without what the clock says."""
    timed = ("seconds", "elapsed", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_jsonl(folder / "metrics.jsonl")]


def weights(trainer):
    """All weights of the policy, in one row."""
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
