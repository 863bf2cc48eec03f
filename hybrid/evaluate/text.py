"""Responses against their targets, as translation, summaries and answers are measured."""

from collections.abc import Sequence
from statistics import fmean

from hybrid.core import InputError, unknown_name
from hybrid.rewards import Reward
from hybrid.rewards.base import rewards

__all__ = ["TEXT_METRICS", "check_text_metrics", "evaluate_texts"]

# Those of sacrebleu are of the corpus, 0 to 100, as papers report them; the others are means of the rewards of the
# same names, 0 to 1.
CORPUS_METRICS = ("bleu", "chrf")
TEXT_METRICS = (*CORPUS_METRICS, "rouge_l", "token_f1", "exact_match")


def check_text_metrics(names: Sequence[str]) -> None:
    """Refuse (InputError) a name that is none of TEXT_METRICS, and one whose library is not installed."""
    for name in names:
        if name not in TEXT_METRICS:
            raise unknown_name("eval.text_metrics", name, TEXT_METRICS)
        try:
            _reward(name)
        except InputError as error:
            raise InputError(f"eval.text_metrics: {error}") from error


def evaluate_texts(names: Sequence[str], responses: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """The text metrics `names` of the responses; white space at both ends does not count.

    num_targets: how many examples have a target. The others are left out; where none has one, so are the metrics.
    """
    pairs = [(ours.strip(), target.strip()) for ours, target in zip(responses, targets, strict=True)]
    pairs = [(ours, target) for ours, target in pairs if target]
    metrics = {"num_targets": float(len(pairs))}
    if pairs:
        texts, references = map(list, zip(*pairs, strict=True))
        for name in names:
            score = _corpus_score if name in CORPUS_METRICS else _mean_score
            metrics[name] = score(name, texts, references)
    return metrics


def _corpus_score(name: str, texts: list[str], references: list[str]) -> float:
    """sacrebleu's score of the whole corpus, with its defaults (Post 2018, arXiv:1804.08771)."""
    from sacrebleu.metrics import BLEU, CHRF

    metric = BLEU() if name == "bleu" else CHRF()
    return float(metric.corpus_score(texts, [references]).score)


def _mean_score(name: str, texts: list[str], references: list[str]) -> float:
    return fmean(_reward(name).score(texts, references))


def _reward(name: str) -> Reward:
    """The reward of that name, as a spec without parameters makes it."""
    return rewards[name]()
