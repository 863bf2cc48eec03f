"""The state of a trainer, and the checkpoint that holds it, so that the next step is the same."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.config import HybridConfig
from hybrid.core import InputError
from hybrid.models import Policy
from hybrid.run import CHECKPOINTS, CONFIG, Checkpoints, load_state, save_state

__all__ = ["MODEL", "load_checkpoint", "load_training_state", "resumable", "training_state", "write_checkpoint"]

# The parts of a trainer that know their own state.
PARTS = ("updater", "kl")
LOADERS = ("loader", "prompts")
PTX_LOADER = ("ptx_loader",)
STREAMS = ("sampler", "shuffler", "speaker")

MODEL, STATE = "model", "state"


def write_checkpoint(trainer: Any, folder: Path, *, progress: Mapping[str, Any] | None = None) -> None:
    """Fill a checkpoint's folder: model/ as transformers writes it, with the value head; the state; the config.

    progress: where the run stands in its strategy, for `HybridTrainer.resume`.
    """
    trainer.policy.save_pretrained(folder / MODEL, tokenizer=trainer.tokenizer)
    save_state(folder / STATE, {**training_state(trainer), "progress": progress})
    trainer.config.save(folder / CONFIG)


def load_checkpoint(trainer: Any, folder: Path) -> dict[str, Any]:
    """Put a trainer that was made alike where `write_checkpoint` found one; returns the state.

    Raises InputError where the folder is no checkpoint.
    """
    if not (folder / MODEL).is_dir():
        raise InputError(f"{str(folder)!r} is not a checkpoint: it has no {MODEL} folder")
    state = load_state(folder / STATE)
    dtype = trainer.policy.backbone.head_weight.dtype
    trainer.policy.load_state_dict(Policy.from_pretrained(folder / MODEL, dtype=dtype).state_dict())
    load_training_state(trainer, state)
    return state


def resumable(folder: Path) -> tuple[HybridConfig, Path]:
    """The config of the run in `folder` and its newest whole checkpoint. Raises InputError where there is none."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{str(folder)!r} holds no run: it has no {CONFIG}")
    checkpoint = Checkpoints(folder / CHECKPOINTS).newest()
    if checkpoint is None:
        raise InputError(f"{str(folder)!r} cannot be resumed: there is no whole checkpoint in its {CHECKPOINTS} folder")
    return HybridConfig.from_file(folder / CONFIG), checkpoint


def training_state(trainer: Any) -> dict[str, Any]:
    """Optimizer, scheduler, KL coefficient, place in the data, random streams, reward and step count."""
    return {
        **{name: getattr(trainer, name).state_dict() for name in _parts(trainer)},
        **{name: getattr(trainer, name).get_state() for name in STREAMS},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "reward": {} if trainer.reward is None else trainer.reward.state_dict(),
        "num_steps": trainer.num_steps,
    }


def load_training_state(trainer: Any, state: Mapping[str, Any]) -> None:
    """Put every part back where `training_state` found it; the random streams last."""
    for name in _parts(trainer):
        getattr(trainer, name).load_state_dict(state[name])
    if trainer.reward is not None:
        trainer.reward.load_state_dict(state["reward"])
    trainer.num_steps = state["num_steps"]
    for name in STREAMS:
        getattr(trainer, name).set_state(state[name])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def _parts(trainer: Any) -> tuple[str, ...]:
    """The loaders too, where there is data: a trainer that only learns by `step` has none."""
    if not trainer.corpus.train:
        return PARTS
    return PARTS + LOADERS + (PTX_LOADER if trainer.corpus.ptx else ())
