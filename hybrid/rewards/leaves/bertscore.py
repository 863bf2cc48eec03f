"""BERTScore: how well the response's words match the target's, by a language model's embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hybrid.core import InputError, first_line
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import max_tokens
from hybrid.rewards.extras import require
from hybrid.rewards.fit import count_longer
from hybrid.rewards.models import ModelReward, existing_model, shared
from hybrid.rewards.samples import Samples, rows_with_text

__all__ = ["BERTScore"]


@register_reward("bertscore")
@dataclass
class BERTScore(ModelReward[Any]):
    """BERTScore F1 of the response against the target, by the library bert_score; up to 1.

        P = mean over the response's tokens of the best cosine with a token of the target;  R = the reverse
        F1 = 2 P R / (P + R)              rescaled: (F1 - b) / (1 - b), b = F1 of unrelated sentences

    0 where either is empty (rescaled like any other score). From about 0.4 for unrelated texts up, of most models;
    rescaling spreads that over 0 to 1, and a poor text may get less than 0.
    Source: Zhang et al. 2020, arXiv:1904.09675; no idf weights.
    """

    reads = ("response", "target")
    needs_target = True

    model_type: str = "microsoft/deberta-xlarge-mnli"
    rescale_with_baseline: bool = False
    baseline_path: str | None = None  # a .tsv file of baselines; None: the one that bert_score has for the model
    num_layers: int | None = None  # whose output is compared; None: bert_score's choice, of an unknown model the last
    lang: str = "en"  # whose baseline
    device: str | None = None

    def __post_init__(self) -> None:
        require("bert_score", reward="bertscore")
        self.model = existing_model(self.model_type, "model_type")
        if self.num_layers is not None and self.num_layers < 1:
            raise InputError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.baseline_path is not None and not self.rescale_with_baseline:
            raise InputError("baseline_path is of use with rescale_with_baseline only, which is false")
        if self.rescale_with_baseline:
            self.baseline_path = self.baseline_path or _packaged_baseline(self.lang, self.model_type)
        if self.baseline_path is not None and not Path(self.baseline_path).is_file():
            raise InputError(
                f"baseline_path must be a file of baselines for {self.model_type!r}, got {self.baseline_path!r}"
            )

    def _load(self, device: torch.device) -> Any:
        return shared(_scorer, self.model, device, self.num_layers, self.rescale_with_baseline, self.baseline_path)

    def _model_scores(self, loaded: Any, samples: Samples) -> Sequence[float]:
        responses, targets = samples.responses, samples.targets
        # bert_score fails on empty texts; its word on them was 0.
        scores = torch.zeros(len(responses))
        full = rows_with_text(zip(responses, targets, strict=True))
        if self.rescale_with_baseline:
            baseline = loaded.baseline_vals[2]
            scores -= baseline / (1 - baseline)
        tokenizer = loaded._tokenizer
        count_longer(tokenizer, [text for i in full for text in (responses[i], targets[i])], tokenizer.model_max_length)
        if full:
            scores[full] = loaded.score([responses[i] for i in full], [targets[i] for i in full])[2]
        return scores.tolist()


class _Folder(str):
    """A folder that bert_score does not take for a T5 model's because there happens to be "t5" in its path."""

    def __contains__(self, part: object) -> bool:
        return part != "t5" and super().__contains__(part)  # type: ignore[operator]


def _packaged_baseline(lang: str, model: str) -> str:
    package = find_spec("bert_score")
    folders = (package.submodule_search_locations if package else None) or []
    for folder in folders:
        file = Path(folder) / "rescale_baseline" / lang / f"{model}.tsv"
        if file.is_file():
            return str(file)
    raise InputError(
        f"baseline_path must be given: bert_score has no baseline of {model!r} for the language {lang!r}, "
        "and would leave the scores as they are"
    )


def _scorer(name: str, device: torch.device, num_layers: int | None, rescale: bool, baseline_path: str | None) -> Any:
    """bert_score's scorer with a cap on the length of texts; its model in eval mode and without gradients."""
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        if num_layers is None:
            num_layers = model2layers.get(name, config.num_hidden_layers)
        scorer = BERTScorer(
            model_type=name if "t5" in config.model_type else _Folder(name),
            num_layers=num_layers,
            device=str(device),
            # Any language does: the baseline's file is given.
            lang="en",
            rescale_with_baseline=rescale,
            baseline_path=baseline_path,
        )
        if rescale:
            scorer.baseline_vals  # noqa: B018 - reads the file, now
    except AssertionError as error:
        raise InputError(f"num_layers is not one that {name!r} has: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"model_type {name!r} cannot be loaded: {first_line(error)}") from error
    scorer._model.requires_grad_(False)
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = max_tokens(tokenizer, scorer._model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return scorer
