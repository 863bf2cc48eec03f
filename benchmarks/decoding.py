"""Reward against the tokens that a decoder spends: search of several kinds on one policy, on the demo's reviews.

    python benchmarks/decoding.py              # 3 seeds, about 10 minutes beside other jobs
    python benchmarks/decoding.py --quick      # a tiny one of each, writes nothing

Each seed teaches the demo's model its reviews by SFT, then trains it, value head and all, by a few of the demo's cycles
of PPO. Then the same held-out prompts are answered by every decoder at every budget. Prints one table, writes
benchmarks/results/decoding-DEVICE.json and draws decoding-DEVICE.png.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.kernels import table  # noqa: E402
from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid import HybridConfig, HybridTrainer, Policy  # noqa: E402
from hybrid.demo.corpus import reviews  # noqa: E402
from hybrid.demo.model import demo_model, demo_tokenizer  # noqa: E402
from hybrid.demo.session import COMMON, LANGUAGE, TASTE  # noqa: E402
from hybrid.evaluate import evaluate_responses  # noqa: E402

TILT = 0.1  # reward that a nat of log-prob is worth: about the demo's KL coefficient
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """num_prompts: held out, answered by each decoder.   budgets: responses' worth of tokens that each may spend."""

    seeds: Sequence[int] = (0, 1, 2)
    num_reviews: int = 3600
    num_prompts: int = 40
    sft_steps: int = 200
    cycles: int = 10
    budgets: Sequence[int] = (1, 2, 4, 8)
    max_new_tokens: int = 32


QUICK = Size(
    seeds=(0,), num_reviews=120, num_prompts=4, sft_steps=2, cycles=1, budgets=(1, 4), max_new_tokens=8
)  # fmt: skip


def arms(budget: int, length: int) -> dict[str, dict[str, Any]]:
    """Every decoder with the settings that spend about budget * length tokens on a response of that length.

    block: a quarter of the length.   mcmc: a step draws half a response in the mean, and the first one is whole.
    value_guided: width * branch states are looked at for each token.   Its beta is 1 / the others': the same tilt.
    greedy: the beam of one branch, which no value steers.
    """
    block, width = max(1, length // 4), max(1, budget // 4)
    if budget == 1:
        return {"sample": {"type": "sample"}, "greedy": {"type": "value_guided", "width": 1, "branch": 1}}
    return {
        "best_of_n": {"type": "best_of_n", "n": budget},
        "best_of_n by value": {"type": "best_of_n", "n": budget, "by": "value"},
        "reward_guided": {"type": "reward_guided", "n": budget, "block": block},
        "value_guided": {"type": "value_guided", "width": width, "branch": budget // width, "beta": 1 / TILT},
        "mcmc": {"type": "mcmc", "target": "tilted", "beta": TILT, "steps": 2 * (budget - 1)},
        "smc": {"type": "smc", "n": budget, "block": block, "beta": TILT},
        "ppo_mcts": {"type": "ppo_mcts", "simulations": budget, "explore": TILT},
    }


def trained(size: Size, seed: int) -> tuple[HybridTrainer, list[Any]]:
    """The demo's policy after its SFT and a few cycles of PPO, and held-out prompts."""
    rows = reviews(size.num_reviews, seed=seed)
    held_out = set(sorted({row["prompt"] for row in rows})[:: max(1, len(rows) // (8 * size.num_prompts))])
    train = [row for row in rows if row["prompt"] not in held_out]
    tokenizer = demo_tokenizer(row["prompt"] + row["target"] for row in train)
    common = {**COMMON, "run": {"seed": seed}, "sampling": {"max_new_tokens": size.max_new_tokens}}
    common["eval"] = {**COMMON["eval"], "every": 0, "num_prompts": 4, "num_examples": 4}
    language = {**common, **LANGUAGE, "mixing": {**LANGUAGE["mixing"], "sft_steps": size.sft_steps}}
    taught = HybridTrainer(
        Policy(demo_model(tokenizer, seed=seed)), tokenizer, train, config=HybridConfig.from_dict(language)
    )
    taught.train()
    taste = {**common, **TASTE, "mixing": {**TASTE["mixing"], "cycles": size.cycles}}
    liking = HybridTrainer(taught.policy, tokenizer, train, config=HybridConfig.from_dict(taste))
    liking.train()
    return liking, liking.corpus.encoded([{"prompt": prompt} for prompt in sorted(held_out)][: size.num_prompts])


def measured(trainer: HybridTrainer, examples: Sequence[Any], decoder: dict[str, Any], seed: int) -> dict[str, float]:
    """Reward, tokens spent and seconds, each of a response."""
    began = time.perf_counter()
    sampling = replace(trainer.config.sampling, decoder=decoder)
    metrics, _ = evaluate_responses(
        trainer.policy, [], trainer.reward, examples, tokenizer=trainer.tokenizer, sampling=sampling,
        batch_size=64, seed=seed, engine=trainer.engine,
    )  # fmt: skip
    return {
        "tokens": metrics.get("decoder/tokens", metrics["response_length"]),
        "reward": metrics["reward"],
        "distinct_2": metrics["distinct_2"],
        "seconds": (time.perf_counter() - began) / len(examples),
        **({"acceptance_rate": metrics[name]} if (name := "decoder/acceptance_rate") in metrics else {}),
    }


def curves(size: Size) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """After each seed: by decoder its points, one for each budget, each measure as a list over the seeds so far."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for seed in size.seeds:
        trainer, examples = trained(size, seed)
        for budget in size.budgets:
            for name, decoder in arms(budget, size.max_new_tokens).items():
                point = measured(trainer, examples, decoder, seed=1234 + seed)
                found.setdefault(name, {}).setdefault(budget, []).append(point)
        yield {
            name: [
                {"budget": budget, **{key: [point[key] for point in points] for key in points[0]}}
                for budget, points in of_decoder.items()
            ]
            for name, of_decoder in found.items()
        }


def lines(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """The table, a row for each decoder and budget."""
    return [
        {
            "decoder": name,
            "budget": str(point["budget"]),
            "tokens": f"{fmean(point['tokens']):.0f}",
            "reward": _with_spread(point["reward"]),
            "distinct-2": f"{fmean(point['distinct_2']):.2f}",
            "ms": f"{1000 * fmean(point['seconds']):.0f}",
        }
        for name, points in found.items()
        for point in points
    ]


def _with_spread(values: Sequence[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.3f} ± {spread:.3f}"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Reward against tokens, a line for each decoder, the seeds' range behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("sample", ":"), ("greedy", "--")):
        (point,) = found[name]
        axes.axhline(fmean(point["reward"]), color="grey", linestyle=style, label=name)
    for name, points in found.items():
        if name in ("sample", "greedy"):
            continue
        tokens = [fmean(point["tokens"]) for point in points]
        (line,) = axes.plot(tokens, [fmean(point["reward"]) for point in points], marker="o", markersize=4, label=name)
        axes.fill_between(
            tokens, [min(point["reward"]) for point in points], [max(point["reward"]) for point in points],
            color=line.get_color(), alpha=0.12, linewidth=0,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens drawn or looked at, a response")
    axes.set_ylabel("reward of the response")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny one of each, writes nothing")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size()
    warnings.simplefilter("ignore")
    for num_seeds, found in enumerate(curves(size), 1):
        if not args.quick:
            # What is there is kept, should the rest not come.
            path = RESULTS / f"decoding-{device_name()}.json"
            of = {**vars(size), "seeds": list(size.seeds)[:num_seeds]}
            path.write_text(json.dumps({**stamp(), "size": of, "curves": found}, indent=1) + "\n", encoding="utf-8")
            draw(found, path.with_suffix(".png"))
    print(table(lines(found), ["decoder", "budget", "tokens", "reward", "distinct-2", "ms"]))


if __name__ == "__main__":
    main()
