"""Rewards that ask a model: loaded when first needed, shared by all that name it, never trained."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from hybrid.core import InputError, first_line, no_progress_bars
from hybrid.rewards.base import Reward
from hybrid.rewards.samples import Samples

__all__ = ["ModelReward", "existing_model", "pretrained", "shared"]

T = TypeVar("T")
Loaded = TypeVar("Loaded")
_shared: dict[tuple[Any, ...], Any] = {}


class ModelReward(Reward, Generic[Loaded]):
    """A reward with a model. A leaf of it is a dataclass with the fields `model` and `device`, and implements

        _load(device) -> what scoring needs, by way of `shared`
        _model_scores(loaded, samples) -> one number each

    The model is loaded by `setup` or at the first score, and asked in inference mode.
    """

    model: str
    device: str | None  # None: the GPU where there is one

    def __post_init__(self) -> None:
        self.model = existing_model(self.model)

    def setup(self, device: str | torch.device | None = None) -> None:
        """Load the model. device: where, unless the spec says."""
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._loaded = self._load(torch.device(self.device or device or fallback))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"reward {self.component_name!r} cannot be loaded: {first_line(error)}") from error

    def _load(self, device: torch.device) -> Loaded:
        raise NotImplementedError(f"{type(self).__name__} must implement _load")

    def _model_scores(self, loaded: Loaded, samples: Samples) -> Sequence[float]:
        raise NotImplementedError(f"{type(self).__name__} must implement _model_scores")

    def _prepare(self) -> None:
        if not hasattr(self, "_loaded"):
            self.setup()

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> Sequence[float]:
        with torch.inference_mode():
            return self._model_scores(self._loaded, Samples(responses, targets, prompts, items))


def existing_model(name: str, parameter: str = "model") -> str:
    """`name`, with ~ written out where it is a path. Raises InputError if it is a path to nothing.

    So a path that is not there is told before anything loads; of a hub's name that cannot be known.
    """
    if not name.strip():
        raise InputError(f"{parameter} must be a model's name or folder, got {name!r}")
    if os.path.isabs(name) or name.startswith((".", "~")):
        name = os.path.expanduser(name)
        if not Path(name).exists():
            raise InputError(f"{parameter} {name!r} does not exist")
    return name


def shared(load: Callable[..., T], name: str, device: torch.device, *options: Any) -> T:
    """`load(name, device, *options)`, once for each: rewards that name one model share it."""
    key = (load, name, str(device), *options)
    if key not in _shared:
        _shared[key] = load(name, device, *options)
    loaded: T = _shared[key]
    return loaded


def pretrained(auto_class: str, name: str, device: torch.device) -> tuple[Any, Any]:
    """(tokenizer, model) of transformers' `auto_class`, in eval mode and without gradients."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        with no_progress_bars():
            model, loading = getattr(transformers, auto_class).from_pretrained(name, output_loading_info=True)
    except Exception as error:
        raise InputError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers, and warns.
        raise InputError(f"model {name!r} has no {', '.join(missing[:3])}: it is not of the kind {auto_class}")
    return tokenizer, model.to(device).eval().requires_grad_(False)
