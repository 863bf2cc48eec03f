"""Toxicity, by detoxify's models."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid.core import InputError, first_line
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, label_index, logits
from hybrid.rewards.extras import require
from hybrid.rewards.models import ModelReward, shared
from hybrid.rewards.samples import Samples

__all__ = ["Toxicity"]

# detoxify's own, which it downloads from its GitHub releases.
RELEASED = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")
# Its releases differ in the names of one thing; it calls them all like the later ones.
RENAMED = {"toxic": "toxicity", "severe_toxic": "severe_toxicity", "identity_hate": "identity_attack"}


@register_reward("toxicity", "detoxify")
@dataclass
class Toxicity(ModelReward[tuple[Classifier, int]]):
    """How free a text is of toxicity, by a model of detoxify; 0 to 1.

        invert = true    1 - the probability of "toxicity"
        invert = false   the probability of "toxicity"

    Of a checkpoint file only tensors and plain values are read, never code.
    Source: https://github.com/unitaryai/detoxify
    """

    reads = ("response",)

    model: str = "original"  # or unbiased, multilingual, original-small, unbiased-small, a checkpoint file
    invert: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model in RELEASED:
            require("detoxify", reward="toxicity")
        elif not Path(self.model).is_file():
            raise InputError(f"model must be a checkpoint file or one of {', '.join(RELEASED)}, got {self.model!r}")

    def _load(self, device: torch.device) -> tuple[Classifier, int]:
        load = _released if self.model in RELEASED else _checkpoint
        classifier = shared(load, self.model, device)
        return classifier, label_index(classifier.labels, "toxicity", "model")

    def _model_scores(self, loaded: tuple[Classifier, int], samples: Samples) -> Sequence[float]:
        classifier, index = loaded
        # The labels may hold together: each has its own sigmoid.
        toxicity = logits(classifier, samples.responses)[:, index].sigmoid()
        return (1 - toxicity if self.invert else toxicity).tolist()


def _released(name: str, device: torch.device) -> Classifier:
    from detoxify import Detoxify

    try:
        loaded = Detoxify(name, device=device)
    except OSError as error:
        raise InputError(f"model {name!r} cannot be downloaded: {first_line(error)}") from error
    return Classifier(loaded.tokenizer, loaded.model.eval().requires_grad_(False), loaded.class_names)


def _checkpoint(file: str, device: torch.device) -> Classifier:
    """A checkpoint of detoxify's training, by its `config.arch.args`; it names the base model, a folder or of the hub.

    Not by detoxify itself, which runs whatever code the file holds and passes over missing weights.
    """
    import transformers

    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        arch, classes = saved["config"]["arch"]["args"], saved["config"]["dataset"]["args"]["classes"]
        base, model_class, tokenizer_class = arch["model_type"], arch["model_name"], arch["tokenizer_name"]
        build = getattr(transformers, model_class)
        model = build(build.config_class.from_pretrained(base, num_labels=arch["num_classes"]))
        missing = model.load_state_dict(saved["state_dict"], strict=False).missing_keys
        tokenizer = getattr(transformers, tokenizer_class).from_pretrained(base)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"model {file!r} holds more than tensors and plain values, and loading that would run its code: "
            "save {'config': ..., 'state_dict': ...} alone if you trust it"
        ) from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f"model {file!r} is no checkpoint of detoxify: it needs state_dict, config.arch.args and "
            f"config.dataset.args.classes ({type(error).__name__}: {first_line(error)})"
        ) from error
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"model {file!r} cannot be loaded: {first_line(error)}") from error
    if missing:
        raise InputError(f"model {file!r} lacks the weights {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")
    labels = [RENAMED.get(name, name) for name in classes]
    return Classifier(tokenizer, model.to(device).eval().requires_grad_(False), labels)
