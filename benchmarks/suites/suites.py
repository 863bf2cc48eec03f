"""The suites: what each measures, what was published of it, and its small local stand-in.

A suite's setting is the config beside this file, NAME.yaml; here is only what a config cannot say.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suites.data import Rows, review_halves, review_queries
from hybrid import DataConfig, Example, HybridConfig, InputError, make_strategy
from hybrid.mixing import Alternate

__all__ = ["SUITES", "Arms", "Suite", "arms_of", "suite_config"]

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"
Arms = dict[str, list[dict[str, Any]]]
Prepare = Callable[[Sequence[Example], Any, DataConfig], Rows]


@dataclass(frozen=True)
class Suite:
    """A setting to be run and compared.

    prepare: makes the rows with `prompt` and `target` out of the examples of the data; None: they stay as they are.
    running_text: perplexity is that of the test texts in one piece; else of the test targets after their prompts.
    response_tokens: each rollout's length is drawn from range(*response_tokens); None: sampling.max_new_tokens.
    published: numbers by arm, of `source`.   smoke: what --smoke overrides, beside SMOKE.
    """

    about: str
    prepare: Prepare | None = None
    running_text: bool = True
    response_tokens: tuple[int, int] | None = None
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""
    smoke: Mapping[str, Any] = field(default_factory=dict)


# Film review sentences with a label, as IMDB has.
SENTENCES = {
    "data.train": str(DATA / "sst2" / "dev_2000.tsv"),
    "data.eval": str(DATA / "sst2" / "test.tsv"),
    "data.text": "sentence",
    "data.filter": None,
    "reward": {"type": "sentiment_lexicon"},
}
# A few small steps of a real small model, to see that everything runs.
SMOKE = {
    "model.name": str(DATA / "stories260k" / "hf"),
    "data.limit": 64,
    "data.max_length": 512,
    "mixing.cycles": 2,
    "mixing.sft_steps_per_cycle": 1,
    "sft.batch_size": 8,
    "sft.microbatch_size": None,
    "ppo.batch_size": 8,
    "ppo.minibatch_size": 4,
    "ppo.microbatch_size": None,
    "ppo.epochs": 1,
    "sampling.min_new_tokens": 0,
    "sampling.max_new_tokens": 15,
    "eval.num_prompts": 16,
    "eval.num_examples": 16,
}

SUITES = {
    "imdb_rl4lms": Suite(
        about="IMDB, GPT-2, in the setting of RL4LMs",
        prepare=review_halves,
        published={
            "zero_shot": {"reward": 0.489, "perplexity": 32.2},
            "sft_only": {"reward": 0.539, "perplexity": 35.5},
            "rl_only": {"reward": 0.602, "perplexity": 33.8},
            "sequential": {"reward": 0.626, "perplexity": 35.0},
        },
        source="Ramamurthy et al. 2023 (arXiv:2210.01241), GPT-2, PPO",
        smoke=SENTENCES,
    ),
    "imdb_trl": Suite(
        about="IMDB, GPT-2, in the setting of old TRL",
        prepare=review_queries,
        response_tokens=(4, 16),
        published={"zero_shot": {"reward": 0.239}, "rl_only": {"reward": 2.475}},
        source="huggingface/trl, examples/notebooks/gpt2-sentiment.ipynb: the mean of 16 queries, one run",
        smoke=SENTENCES,
    ),
    "wikitext": Suite(
        about="WikiText-2, GPT-2, ROUGE-L against the paragraph's rest",
        smoke={
            "data.train": str(DATA / "wikitext2" / "valid.txt"),
            "data.eval": str(DATA / "wikitext2" / "test.txt"),
            "data.limit": 24,  # paragraphs, which are long
            "eval.num_prompts": 6,
        },
    ),
    "own_data": Suite(
        about="your own prompts, targets and reward",
        running_text=False,
        smoke={
            "data.train": str(DATA / "gsm8k" / "train_1500.jsonl"),
            "data.prompt": "question",
            "data.target": "answer",
        },
    ),
}


def suite_config(name: str, overrides: Sequence[str] = (), *, smoke: bool = False) -> HybridConfig:
    """The config of a suite, with the stand-ins where it is a smoke test, and then the overrides."""
    stand_ins: dict[str, Any] = {}
    if smoke:
        if not DATA.is_dir():
            raise InputError(f"--smoke needs the small models and data in {DATA}, which is not there")
        stand_ins = {**SMOKE, **SUITES[name].smoke}
    # JSON is YAML.
    pairs = [f"{key}={json.dumps(value)}" for key, value in stand_ins.items()]
    return HybridConfig.from_file(HERE / f"{name}.yaml", [*pairs, *overrides])


def arms_of(config: HybridConfig) -> Arms:
    """What is compared, arm by arm: the stages of each, as sections `mixing`.

    All take their steps from the config's, which is the arm `alternate`: S supervised and P PPO steps. A stage starts
    with a new optimizer, and with the policy as it then is for its reference.
    """
    strategy = make_strategy(config.mixing)
    if not isinstance(strategy, Alternate) or strategy.curriculum != "none":
        raise InputError("a suite's mixing must be alternate, without a curriculum: its other arms are made from it")
    sft, ppo = (strategy.cycles * n for n in (strategy.sft_steps_per_cycle, strategy.ppo_steps_per_cycle))
    if not (sft and ppo):
        raise InputError("a suite's mixing needs steps of both kinds in a cycle")
    sft_stage = {"strategy": "sequential", "sft_steps": sft, "ppo_steps": 0}
    ppo_stage = {"strategy": "sequential", "sft_steps": 0, "ppo_steps": ppo}
    return {
        "zero_shot": [],
        "sft_only": [sft_stage],
        "rl_only": [ppo_stage],
        "sequential": [sft_stage, ppo_stage],
        "alternate": [dict(config.mixing)],
    }
