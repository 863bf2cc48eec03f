"""Which numbers of a run stand in which figure, and what its kinds of step are called."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "TRAINING",
    "Line",
    "Panel",
    "Rows",
    "attributed",
    "called",
    "objectives_of",
    "panels",
    "phase_names",
    "training_phases",
]

Rows = list[dict[str, Any]]

TRAINING = ("sft", "ppo", "joint")  # the kinds of step that every run's page has a colour for
STEPS = "steps"  # in a line's keys: every kind of step that is not named there
_NAMES = {
    "sft": "SFT",
    "ppo": "PPO",
    "ptx": "PTX",
    "dpo": "DPO",
    "online_dpo": "online DPO",
    "spin": "SPIN",
    "kto": "KTO",
    "reward_model": "reward model",
    "distill": "distillation",
    "distill_data": "distillation on the data",
    "raft": "RAFT",
    "replay": "replay",
}
# Of what their losses are means, where these are not pairs.
_LOSS_UNITS = {
    "kto": "per answer",
    **dict.fromkeys(("distill", "distill_data", "raft", "ptx", "replay"), "nats per token"),
}
# What a step finds of answers that are to be told apart, beside a loss.
_OF_ANSWERS = ("accuracy", "chosen_reward", "rejected_reward", "desirable_reward", "undesirable_reward", "margin_mean")


@dataclass(frozen=True)
class Line:
    """Which number of which phase is drawn, and how it is told from the panel's other line, where there is one."""

    keys: Mapping[str, str]
    label: str = ""
    ink: str = ""  # "": that of the phase

    def key(self, phase: str) -> str | None:
        """The name of the phase's number; None where it has none."""
        return self.keys.get(phase, None if phase == "eval" else self.keys.get(STEPS))


@dataclass(frozen=True)
class Panel:
    """One figure over the training's steps."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def _panel(title: str, unit: str, keys: Mapping[str, str]) -> Panel:
    return Panel(title, unit, (Line(keys),))


_FIRST = (
    _panel("Reward", "mean score", {STEPS: "reward", "eval": "reward"}),
    _panel("KL to the reference", "nats per response", {STEPS: "kl", "eval": "kl"}),
)
_LAST = (
    _panel("SFT loss", "nats per token", {"sft": "loss", "joint": "sft_loss", "eval": "sft_loss"}),
    _panel("BLEU", "of the corpus, 0 to 100", {"eval": "bleu"}),
    _panel("chrF", "of the corpus, 0 to 100", {"eval": "chrf"}),
    _panel("ROUGE-L", "mean F1, 0 to 1", {"eval": "rouge_l"}),
    _panel("Word F1", "mean, 0 to 1", {"eval": "token_f1"}),
    _panel("Exact match", "share of responses", {"eval": "exact_match"}),
    _panel("Entropy", "nats per token", {STEPS: "entropy"}),
    _panel("Response length", "tokens", {STEPS: "response_length", "eval": "response_length"}),
    _panel("Throughput", "tokens per second", {STEPS: "tokens_per_second"}),
)


def called(name: str) -> str:
    """An objective's name as people write it."""
    return _NAMES.get(name, name)


def training_phases(runs: Iterable[Mapping[str, Rows]]) -> tuple[str, ...]:
    """The kinds of step: those that every page knows, then the runs' own as they come."""
    return tuple(dict.fromkeys([*TRAINING, *(phase for rows in runs for phase in rows if phase != "eval")]))


def phase_names(rows: Mapping[str, Rows]) -> dict[str, str]:
    """What a run's phases are called in a text, by phase."""
    names = {phase: called(phase) for phase in training_phases([rows])}
    joint = _in_joint(rows)
    parts = [*(["ppo"] if any("ppo_loss" in row for row in rows["joint"]) else []), *joint]
    parts += ["sft"] if any("sft_loss" in row for row in rows["joint"]) else []
    names["joint"] = f"joint {_listed([called(part) for part in parts])}" if joint else "joint SFT and PPO"
    return names | {"eval": "held-out evaluation"}


def objectives_of(runs: Iterable[Mapping[str, Rows]]) -> list[str]:
    """The objectives beside sft and ppo that the runs have numbers of, by name."""
    found: dict[str, None] = {}
    for rows in runs:
        found |= dict.fromkeys(phase for phase in training_phases([rows])[len(TRAINING) :])
        found |= dict.fromkeys(_in_joint(rows))
        # Not the parts of a reward: reward/PART/raw_mean.
        keys = dict.fromkeys(key for row in rows["eval"] for key in row if key.count("/") == 1)
        found |= dict.fromkeys(key.partition("/")[0] for key in keys)
    return list(found)


def attributed(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows, in which the accuracy and the rewards of a joint step go by their objective, as in an evaluation.

    A joint step gives a name to the losses alone; what else there is of pairs is left out of the curves where more
    than one objective may have found it.
    """
    owners = [name for name in _in_joint(rows) if _LOSS_UNITS.get(name) != "nats per token"]
    if len(owners) != 1:
        return dict(rows)
    joint = [{f"{owners[0]}/{key}": row[key] for key in _OF_ANSWERS if key in row} | row for row in rows["joint"]]
    return {**rows, "joint": joint}


def panels(runs: Sequence[Mapping[str, Rows]]) -> list[Panel]:
    """The panels that runs of these (`attributed`) rows may have numbers for, in the order of the page."""
    drawn = [(name, panel) for name in objectives_of(runs) for panel in _panels_of(name) if _has_numbers(panel, runs)]
    titles = [panel.title for _, panel in drawn]
    own = [
        replace(panel, title=f"{panel.title}, {called(name)}") if titles.count(panel.title) > 1 else panel
        for name, panel in drawn
    ]
    return [*_FIRST, *own, *_LAST]


def _panels_of(name: str) -> list[Panel]:
    """Of one objective: its loss, how well it tells good from bad, and the rewards by which it does."""

    def keys(number: str) -> dict[str, str]:
        return {name: number, "joint": f"{name}/{number}", "eval": f"{name}/{number}"}

    loss = {name: "loss", "joint": f"{name}_loss", "eval": f"{name}/loss"}
    better, worse = ("good", "bad") if name == "kto" else ("chosen", "rejected")
    better_key, worse_key = _OF_ANSWERS[3:5] if name == "kto" else _OF_ANSWERS[1:3]
    lines = Line(keys(better_key), better, "up"), Line(keys(worse_key), worse, "down")
    accuracy = "Accuracy" if name == "kto" else "Pairwise accuracy"
    return [
        _panel(f"{called(name)[:1].upper()}{called(name)[1:]} loss", _LOSS_UNITS.get(name, "per pair"), loss),
        _panel(accuracy, "share", keys("accuracy")),
        Panel("Rewards", f"{better}, {worse}", lines),
        _panel("Margin", "chosen \N{MINUS SIGN} rejected", keys("margin_mean")),
    ]


def _in_joint(rows: Mapping[str, Rows]) -> list[str]:
    """The objectives beside sft and ppo whose losses are summands of the joint steps."""
    found: dict[str, None] = {}
    for row in rows["joint"]:
        losses = [key.removesuffix("_loss") for key in row if key.endswith("_loss")]
        found |= dict.fromkeys(name for name in losses if f"{name}_coef" in row or name in _NAMES)
    return [name for name in found if name not in ("sft", "ppo", "ptx")]


def _has_numbers(panel: Panel, runs: Sequence[Mapping[str, Rows]]) -> bool:
    return any(
        row.get(key) is not None
        for rows in runs
        for line in panel.lines
        for phase in rows
        if (key := line.key(phase)) is not None
        for row in rows[phase]
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
