"""The state of a trainer, and the checkpoint that holds it, so that the next step is the same."""

import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hybrid.config import HybridConfig
from hybrid.core import InputError
from hybrid.edits import check_edits
from hybrid.learner import Learner
from hybrid.models import under_adapter
from hybrid.run import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    MANIFEST,
    Checkpoints,
    check_unlocked,
    disk_errors,
    finished_step,
    load_state,
    save_state,
)

__all__ = [
    "checkpoint_state",
    "load_checkpoint",
    "load_training_state",
    "resumable",
    "trained_config",
    "training_state",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

MODEL, STATE, SHARDS = "model", "state", "shards"


@contextmanager
def checkpoint_state(learner: Learner, *, progress: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The state of a checkpoint that `write_checkpoint` writes inside the block, where the weights are whole.

    Every process takes it; the first one writes. What each has a part of lies on the disk by then, at "shards".
    progress: where the run stands in its strategy, for `HybridTrainer.resume`.
    """
    state: dict[str, Any] = {**training_state(learner), "progress": progress}
    updater = state["updater"]
    with disk_errors("save a checkpoint's shards", "; those before it are as they were"):
        updater["optimizer"], shards = learner.world.write_shards(updater["optimizer"], learner.folder)
    with learner.world.gathered():
        yield {**state, **({} if shards is None else {SHARDS: str(shards)})}


def write_checkpoint(learner: Learner, folder: Path, *, state: Mapping[str, Any]) -> None:
    """Fill a checkpoint's folder: model/ as transformers writes it, with the value head; the state; the config.

    Of a LoRA run model/ holds the adapter as it is (merged weights would not give its bits back); the frozen model
    is not saved again but read, and quantized again, from where the run had it.
    state: of `checkpoint_state`.
    """
    learner.policy.save_pretrained(folder / MODEL, tokenizer=learner.tokenizer, merge=False)
    save_state(folder / STATE, {name: of for name, of in state.items() if name != SHARDS})
    learner.config.save(folder / CONFIG)
    if SHARDS in state:
        shutil.move(state[SHARDS], folder / SHARDS)


def load_checkpoint(learner: Learner, folder: Path) -> dict[str, Any]:
    """Put a trainer that was made alike where `write_checkpoint` found one; returns the state.

    Raises InputError where the folder is no checkpoint.
    """
    if not (folder / MODEL).is_dir():
        raise InputError(f"{str(folder)!r} is not a checkpoint: it has no {MODEL} folder")
    state: dict[str, Any] = load_state(folder / STATE)
    if (folder / SHARDS).is_dir():
        updater, optimizer = state["updater"], learner.updater.optimizer
        updater["optimizer"] = learner.world.read_shards(updater["optimizer"], folder / SHARDS, optimizer)
    with learner.world.loading():
        learner.policy.load_weights(folder / MODEL)
    load_training_state(learner, state)
    return state


def resumable(folder: Path, overrides: Sequence[str] = ()) -> tuple[HybridConfig, Path | None]:
    """The config of the run in `folder` and its newest whole checkpoint; None where it has saved none so far.

    overrides: `section.key=value`, on top of the folder's config.yaml.
    Raises InputError where there is no run, where it still goes on, where none of its checkpoints is whole, where it
    is finished and has none, and where a key has changed that may not (`check_edits`).
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{str(folder)!r} holds no run: it has no {CONFIG}")
    check_unlocked(folder)
    checkpoint = Checkpoints(folder / CHECKPOINTS).newest()
    if checkpoint is None and any((folder / CHECKPOINTS).glob("step-*")):
        raise InputError(f"{str(folder)!r} cannot be resumed: no checkpoint in its {CHECKPOINTS} folder is whole")
    config, finished = HybridConfig.from_file(folder / CONFIG, overrides), finished_step(folder)
    if checkpoint is not None:
        check_edits(HybridConfig.from_file(checkpoint / CONFIG), config, checkpoint)
    if finished is not None and checkpoint is None:
        raise InputError(
            f"{str(folder)!r} is finished after step {finished}, nothing is left of it; its model is in "
            f"{folder / EXPORT}, and model.name={folder / EXPORT} starts a new run with it"
        )
    if checkpoint is None:
        logger.warning("%s has saved no checkpoint: it starts again from step 0", folder)
    return config, checkpoint


def trained_config(folder: Path, overrides: Sequence[str] = ()) -> HybridConfig:
    """The config of a run with the model it exported, or of a checkpoint with the model in it, writing nothing.

    A reference that was the model it started from is still that one. Raises InputError where `folder` is neither, and
    by name for a file of a checkpoint that is not as it was saved.
    """
    model = next((folder / name for name in (EXPORT, MODEL) if (folder / name).is_dir()), None)
    if model is None or not (folder / CONFIG).is_file():
        raise InputError(f"{str(folder)!r} is neither a run with an {EXPORT} folder nor a checkpoint")
    if (folder / MANIFEST).is_file():
        Checkpoints.verify(folder)
    config = HybridConfig.from_file(folder / CONFIG, overrides)
    config = replace(config, run=replace(config.run, output=None))
    if under_adapter(model) is not None:
        # The model it started from is the one under the adapter.
        return replace(config, model=replace(config.model, name=str(model)))
    started = config.model.name
    if started is None:
        raise InputError(f"{str(folder / CONFIG)!r} does not say what model the run started from; set model.name=...")
    as_it_was: dict[str, Any] = {"model": started, "load_in_4bit": config.model.load_in_4bit}
    references = tuple(r if r.model is not None else replace(r, **as_it_was) for r in config.references)
    plain = replace(config.model, name=str(model), lora=None, load_in_4bit=False)
    return replace(config, model=plain, references=references)


def training_state(learner: Learner) -> dict[str, Any]:
    """Optimizer, scheduler, KL coefficient, place in the data, random streams, reward and step count."""
    return {
        **{name: part.state_dict() for name, part in _parts(learner).items()},
        **learner.loaders.state_dict(),
        **{name: stream.get_state() for name, stream in _streams(learner).items()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "reward": {} if learner.reward is None else learner.world.main(learner.reward.state_dict),
        "objectives": {name: of for name, made in learner.objectives.items() if (of := made.state_dict())},
        **({} if learner.memory is None else {"memory": learner.memory.state_dict()}),
        "num_steps": learner.num_steps,
        "data": learner.corpus.fingerprint,
    }


def load_training_state(learner: Learner, state: Mapping[str, Any]) -> None:
    """Put every part back where `training_state` found it; the random streams last.

    Raises InputError where the data are not those that the state was saved with.
    """
    # Checkpoints of version 0.1 do not say what their data were.
    learner.corpus.check_fingerprint(state.get("data"))
    for name, part in _parts(learner).items():
        part.load_state_dict(state[name])
    learner.loaders.load_state_dict(state)
    if (reward := learner.reward) is not None:
        learner.world.main(lambda: reward.load_state_dict(state["reward"]))
    # Checkpoints of version 0.1 have none.
    for name, of in state.get("objectives", {}).items():
        learner.objectives[name].load_state_dict(of)
    if learner.memory is not None:
        learner.memory.load_state_dict(state["memory"])
    learner.num_steps = state["num_steps"]
    for name, stream in _streams(learner).items():
        stream.set_state(state[name])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


class _Part(Protocol):
    """A part of a learner that knows its own state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


def _parts(learner: Learner) -> dict[str, _Part]:
    return {"updater": learner.updater, "kl": learner.kl}


def _streams(learner: Learner) -> dict[str, torch.Generator]:
    return {"sampler": learner.sampler, "shuffler": learner.shuffler, "speaker": learner.speaker}
