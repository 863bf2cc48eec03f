"""The measures of an evaluation: what they are called, how they are written, and which end of one is the better."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from hybrid.run.panels import called

__all__ = ["better_end", "measures_of"]

# Name of the number, what it is called, its unit, how it is written, how its change is.
Measure = tuple[str, str, str, str, Callable[[float, float], str]]


def _difference(format: str, scale: float = 1.0) -> Callable[[float, float], str]:
    return lambda before, after: format.format(scale * (after - before))


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+z.1%}" if before else ""


def _ratio(before: float, after: float) -> str:
    return f"\N{MULTIPLICATION SIGN}{after / before:.2f}" if before else ""


_OF_REWARD: tuple[Measure, ...] = (
    ("reward", "Mean reward", "± standard error", "{:z.3f}", _difference("{:+z.3f}")),
    ("positive", "Reward above zero", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
)
_OF_TEXTS: tuple[Measure, ...] = (
    ("sft_loss", "Validation SFT loss", "nats per token", "{:z.3f}", _percent),
    ("kl", "KL to the reference", "nats per response", "{:z.2f}", _difference("{:+z.2f}")),
    ("distinct_2", "Distinct-2", "share of bigrams that differ", "{:.3f}", _ratio),
    ("response_length", "Response length", "tokens", "{:.1f}", _difference("{:+z.1f}")),
    ("eos_share", "Ended with EOS", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
    ("bleu", "BLEU", "of the corpus, 0 to 100", "{:.1f}", _difference("{:+z.1f}")),
    ("chrf", "chrF", "of the corpus, 0 to 100", "{:.1f}", _difference("{:+z.1f}")),
    ("rouge_l", "ROUGE-L", "mean F1, 0 to 1", "{:.3f}", _difference("{:+z.3f}")),
    ("token_f1", "Word F1", "mean, 0 to 1", "{:.3f}", _difference("{:+z.3f}")),
    ("exact_match", "Exact match", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
)
# The same, of an objective: in an evaluation OBJECTIVE/NAME.
_OF_PAIRS: tuple[Measure, ...] = (
    ("accuracy", "Pairwise accuracy", "± standard error", "{:.1%}", _difference("{:+z.1f} points", 100)),
    ("loss", "Preference loss", "per pair", "{:z.3f}", _percent),
    ("margin_mean", "Margin", "chosen \N{MINUS SIGN} rejected", "{:z.3f}", _difference("{:+z.3f}")),
    ("ece", "Calibration error", "ECE, 0 to 1", "{:.3f}", _difference("{:+z.3f}")),
)
# Where runs are compared; a report has curves of them.
_MORE_OF_PAIRS: tuple[Measure, ...] = (
    ("chosen_reward", "Chosen reward", "mean", "{:z.3f}", _difference("{:+z.3f}")),
    ("rejected_reward", "Rejected reward", "mean", "{:z.3f}", _difference("{:+z.3f}")),
    ("score_mean", "Score", "mean of all answers", "{:z.3f}", _difference("{:+z.3f}")),
    ("score_std", "Deviation of the scores", "of all answers", "{:z.3f}", _difference("{:+z.3f}")),
)
# Which end of a measure is the better, where one is: neither a long response nor a far one is good or bad in itself.
_BETTER: Mapping[str, Literal["min", "max"]] = {
    "sft_loss": "min",
    "perplexity": "min",
    **dict.fromkeys(("reward", "positive", "bleu", "chrf", "rouge_l", "token_f1", "exact_match"), "max"),
}
_BETTER_OF_PAIRS: Mapping[str, Literal["min", "max"]] = {"accuracy": "max", "loss": "min", "ece": "min"}


def better_end(metric: str) -> Literal["min", "max"] | None:
    """Which end of a measure, or of an objective's (dpo/accuracy), is the better; None where neither is."""
    _, slash, name = metric.partition("/")
    return _BETTER_OF_PAIRS.get(name) if slash else _BETTER.get(metric)


def measures_of(evaluations: Iterable[Mapping[str, Any]], *, every: bool = False) -> tuple[Measure, ...]:
    """The measures that these evaluations may have, in the order of a page: of several objectives each by its name.

    every: all that have a name of their own, not only those by which a run is judged.
    """
    keys = list(dict.fromkeys(key for row in evaluations for key in row if key.count("/") == 1))
    names = {key.partition("/")[0]: None for key in keys if key.partition("/")[2] in ("accuracy", "loss")}
    of_pairs = [
        (f"{objective}/{key}", f"{name}, {called(objective)}" if len(names) > 1 else name, unit, format, change)
        for key, name, unit, format, change in (*_OF_PAIRS, *(_MORE_OF_PAIRS if every else ()))
        for objective in names
        if f"{objective}/{key}" in keys
    ]
    return (*_OF_REWARD, *of_pairs, *_OF_TEXTS)
