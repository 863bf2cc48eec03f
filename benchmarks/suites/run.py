"""Published settings, and your own: the same model zero-shot, after SFT, after PPO, after both, and after the hybrid.

    python benchmarks/suites/run.py imdb_trl                      # five seeds; where a hub is reachable, and a GPU
    python benchmarks/suites/run.py own_data --data my.jsonl --model gpt2 reward=my_reward.json
    python benchmarks/suites/run.py wikitext --smoke              # a minute, local stand-ins, through the same code

Prints a table of means with 95 % confidence intervals over the seeds beside what was published, and writes
benchmarks/results/suite-NAME-<device>.json after every run (--smoke: only with --output). Any key of NAME.yaml can be
overridden.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A script's own folder comes first on the path; its files are imported as parts of `benchmarks.suites`.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(ROOT)

from transformers.utils import logging  # noqa: E402

import benchmarks.suites.reward  # noqa: E402, F401 - registers review_sentiment
from benchmarks.mixing_report import interval  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402
from benchmarks.suites.data import Rows, examples_of  # noqa: E402
from benchmarks.suites.hub import check_hub  # noqa: E402
from benchmarks.suites.measure import measured, trained  # noqa: E402
from benchmarks.suites.suites import SUITES, Suite, arms_of, suite_config  # noqa: E402
from hybrid import HybridConfig, InputError, make_reward  # noqa: E402
from hybrid.core import unknown_name  # noqa: E402
from hybrid.setup import load_tokenizer  # noqa: E402

COLUMNS = {
    "reward": "reward",
    "perplexity": "perplexity",
    "kl": "KL",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "response_length": "tokens",
    "rouge_l": "ROUGE-L",
    "token_f1": "token F1",
}
MOST_SEEDS = 10  # as far as the quantiles of `interval` go
RESULTS = ROOT / "benchmarks" / "results"
NUM_SAMPLES = 4  # responses of each run that the result keeps

Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the suite was run, 2 for bad input, with a line that says what."""
    args = _parser().parse_intermixed_args(argv)
    logging.disable_progress_bar()
    try:
        _run_suite(args)
    except InputError as error:
        print(f"suites: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the suite's config, e.g. ppo.epochs=2")
    parser.add_argument("--model", metavar="NAME", help="instead of model.name: a folder or a hub name")
    parser.add_argument("--data", metavar="FILE", help="instead of data.train: a file or a data set of the hub")
    parser.add_argument("--arms", metavar="A,B", help="only these (default: all five)")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each arm (default: 5; with --smoke 2)")
    parser.add_argument("--smoke", action="store_true", help="local stand-ins and a few steps, to see that it runs")
    parser.add_argument("--output", metavar="FILE", help="where to write the result")
    return parser


def _run_suite(args: argparse.Namespace) -> None:
    suite, config, arms = SUITES[args.suite], _config(args), {}
    num_seeds = (2 if args.smoke else 5) if args.seeds is None else args.seeds
    if not 1 <= num_seeds <= MOST_SEEDS:
        raise InputError(f"--seeds must lie in [1, {MOST_SEEDS}], got {num_seeds}")
    known = arms_of(config)
    for name in args.arms.split(",") if args.arms else known:
        if name not in known:
            raise unknown_name("arm", name, known)
        arms[name] = known[name]
    make_reward(config.reward)
    check_hub(config)
    assert config.model.name is not None
    tokenizer = load_tokenizer(config.model.name)
    config, train, test, text = _prepared(suite, config, tokenizer)
    result = {
        "suite": args.suite,
        "smoke": args.smoke,
        **stamp("datasets"),
        "config": config.written(),
        **_known_of(suite),
    }
    file = _result_file(args, result["device"])
    runs: list[Run] = []
    for seed in range(num_seeds):
        for arm, stages in arms.items():
            print(f"{args.suite}: {arm}, seed {seed}", flush=True)
            seeded = replace(config, run=replace(config.run, seed=seed))
            policy = trained(stages, seeded, tokenizer, train, response_tokens=suite.response_tokens)
            metrics, samples = measured(policy, seeded, tokenizer, test, text)
            runs.append({"arm": arm, "seed": seed, "metrics": metrics, "samples": samples[:NUM_SAMPLES]})
            if file is not None:
                file.write_text(json.dumps({**result, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{_table(suite, runs)}\n")
    if suite.source:
        print(f"published: {suite.source}")
    if args.smoke:
        print("--smoke: a few steps on stand-ins, whose numbers say nothing but that it runs")
    if file is not None:
        print(f"wrote {file}")


def _config(args: argparse.Namespace) -> HybridConfig:
    given = {"model.name": args.model, "data.train": args.data}
    named = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    config = suite_config(args.suite, [*named, *args.overrides], smoke=args.smoke)
    if config.model.name is None or config.model.lora is not None:
        raise InputError("a suite needs model.name, and trains all weights: leave model.lora out")
    return config


def _prepared(suite: Suite, config: HybridConfig, tokenizer: Any) -> tuple[HybridConfig, Rows, Rows, str | None]:
    """The config of rows that are read, filtered and prepared; training rows, test rows, and the running text."""
    train, test = examples_of(config)
    data = replace(config.data, train=None, eval=None, eval_fraction=0.0, filter=None, limit=None)
    text = "\n\n".join(example.target for example in test) if suite.running_text else None
    if suite.prepare is None:
        train_rows, test_rows = ([dict(example.item) for example in part] for part in (train, test))
    else:
        train_rows, test_rows = (suite.prepare(part, tokenizer, config.data) for part in (train, test))
        data = replace(data, text=None, prompt="prompt", target="target")
    return replace(config, data=data), train_rows, test_rows, text


def _known_of(suite: Suite) -> dict[str, Any]:
    return {"about": suite.about, "published": suite.published, "source": suite.source}


def _result_file(args: argparse.Namespace, device: str) -> Path | None:
    if args.output is not None:
        if not Path(args.output).parent.is_dir():
            raise InputError(f"--output {args.output!r}: there is no such folder")
        return Path(args.output)
    name = f"suite-{args.suite}-{device.replace(' ', '-').lower()}.json"
    return None if args.smoke else RESULTS / name


def _table(suite: Suite, runs: Sequence[Run]) -> str:
    """Markdown: an arm a line; beside a measure that was published, what was."""
    measures = [name for name in COLUMNS if name in runs[0]["metrics"]]
    shown = {name: any(name in numbers for numbers in suite.published.values()) for name in measures}
    titles = [suite.about]
    for name in measures:
        titles += [COLUMNS[name], "published"] if shown[name] else [COLUMNS[name]]
    lines = [titles, ["---"] * len(titles)]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own, line = [run["metrics"] for run in runs if run["arm"] == arm], [arm]
        for name in measures:
            line.append(_interval([metrics[name] for metrics in own]))
            if shown[name]:
                line.append(_number(suite.published.get(arm, {}), name))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(numbers: Sequence[float]) -> str:
    mean, half = interval(numbers)
    return f"{mean:.4g}" if math.isnan(half) else f"{mean:.4g} ± {half:.2g}"


def _number(numbers: Mapping[str, float], name: str) -> str:
    return f"{numbers[name]:.4g}" if name in numbers else ""


if __name__ == "__main__":
    sys.exit(main())
