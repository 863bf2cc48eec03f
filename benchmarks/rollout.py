"""Tokens a second of answering prompts: our engine beside transformers' `generate` and vLLM, by turns in one run.

    python benchmarks/rollout.py                            # on the CPU: tiny, mid and SmolLM2's shape
    python benchmarks/rollout.py --vllm-python ENVIRONMENT/bin/python
    python benchmarks/rollout.py --gpu                      # GPT-2's shape and a Llama of 1.5B, at most 6 minutes

All contenders get the same model files and prompts, and must draw the same number of tokens in every round, or the run
ends. Prints one table, and writes a file for each size: benchmarks/results/rollout-SIZE-DEVICE.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.bandwidth import copy_bandwidth  # noqa: E402
from benchmarks.contender_process import (  # noqa: E402
    Failed,
    Process,
    add_options,
    by_turns,
    environment,
    parsed_options,
)
from benchmarks.contenders.protocol import RolloutJob  # noqa: E402
from benchmarks.kernels import table  # noqa: E402
from benchmarks.ppo_sizes import SIZES as PPO_SIZES  # noqa: E402
from benchmarks.ppo_sizes import Size, write_model  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402

SEED = 0
SIZES = {
    **PPO_SIZES,
    "smollm2": replace(PPO_SIZES["smollm2"], num_prompts=32, prompt_length=10),
    "llama-1.5b": replace(PPO_SIZES["llama-1.5b"], num_prompts=16),
}
ENGINES = ("ours", "generate", "static", "vllm")
ON_CPU = ["ours", "ours:bfloat16", "generate", "generate:bfloat16", "static", "vllm", "vllm:bfloat16"]
# What is compiled there takes minutes to warm up: one of it.
ON_GPU = ["ours", "ours:bfloat16", "generate", "generate:bfloat16", "static:bfloat16", "vllm:bfloat16"]
BYTES = {"float32": 4, "bfloat16": 2}
COLUMNS = ["size", "contender", "tokens/s", "slowest", "fastest", "x ours", "of limit", "peak MiB"]


def main() -> None:
    arguments = parsed()
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    rows = []
    for number, name in enumerate(arguments.sizes, 1):
        # Each size has its share of the time.
        deadline = began + arguments.limit * number / len(arguments.sizes)
        result = measure(name, arguments, deadline)
        rows += result["rows"]
        if not arguments.quick:
            write(name, result, arguments)
    print(table([in_table(row) for row in rows], COLUMNS))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, help="default: tiny mid smollm2; with --gpu: gpt2 llama-1.5b")
    add("--contenders", nargs="+", metavar="ENGINE[:bfloat16]", help=f"{', '.join(ENGINES)}; `x ours` is over the "
        "first of ours")  # fmt: skip
    add_options(parser, rounds=5, of="answers")
    add("--vllm-python", default=sys.executable, help="an interpreter that has vLLM; default: this one")
    arguments = parsed_options(parser)
    arguments.sizes = arguments.sizes or (["gpt2", "llama-1.5b"] if arguments.gpu else ["tiny", "mid", "smollm2"])
    arguments.contenders = arguments.contenders or (ON_GPU if arguments.gpu else ON_CPU)
    for name in arguments.contenders:
        if parts(name)[0] not in ENGINES or parts(name)[1] not in BYTES:
            parser.error(f"unknown contender {name!r}; known: {', '.join(ENGINES)}, each also with :bfloat16")
    return arguments


def parts(contender: str) -> tuple[str, str]:
    """ENGINE[:PRECISION] -> (engine, precision)."""
    engine, _, precision = contender.partition(":")
    return engine, precision or "float32"


def measure(name: str, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The limits, and a row for each contender that runs; says which do not, and why."""
    size, device = SIZES[name], arguments.device
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, size, seed=SEED, device=device)
        bandwidth = copy_bandwidth(device, 4096 if device == "cuda" else 256)
        limits = {precision: limit(model, size, bandwidth, num_bytes) for precision, num_bytes in BYTES.items()}
        print(
            f"{name}: {size.num_prompts} x ({size.prompt_length} + {size.response_length}) tokens; "
            f"{bandwidth / 1e9:.3g} GB/s allow "
            + " and ".join(f"{speed:.3g} tokens/s in {precision}" for precision, speed in limits.items())
        )
        processes = started(model, size, arguments, Path(folder))
        rounds = by_turns(processes, arguments.rounds, deadline)
        for process in processes:
            process.close()
    rows = [row(name, process, rounds[process.name], limits) for process in processes if process.name in rounds]
    for one in rows:
        first = next((other for other in rows if other["contender"].startswith("ours")), one)
        one["times_ours"] = one["tokens_per_second"] / first["tokens_per_second"]
    return {"bandwidth": bandwidth, "limits": limits, "rows": rows}


def started(model: Path, size: Size, arguments: argparse.Namespace, folder: Path) -> list[Process]:
    """Those that say that they are ready."""
    processes = []
    for number, name in enumerate(arguments.contenders):
        engine, precision = parts(name)
        job = RolloutJob(
            str(model), size.prompts(SEED), size.response_length, arguments.device, engine, precision, SEED
        )  # fmt: skip
        python = arguments.vllm_python if engine == "vllm" else sys.executable
        try:
            processes.append(Process(
                name, "rollout_engines.py", job, python=python,
                environment=environment(arguments.threads), log=folder / f"{number}.log",
            ))  # fmt: skip
        except Failed as failed:
            print(f"{name} is left out: {failed}")
    return processes


def limit(model: Path, size: Size, bandwidth: float, num_bytes: int) -> float:
    """Tokens a second where every token of a row reads all weights, once for all rows, and the row's keys and values.

    bandwidth: bytes a second.   num_bytes: of a number.   Reading the prompts is not counted.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    seen = size.prompt_length + (size.response_length - 1) / 2  # on average
    kept = seen * 2 * config.num_hidden_layers * heads * width
    return bandwidth / num_bytes / (num_weights(config) / size.num_prompts + kept)


def num_weights(config: Any) -> int:
    """Of a token's forward pass: of an embedding it reads one row, which is nothing, and a head is read whole."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = (layer for layer in model.modules() if not isinstance(layer, nn.Embedding))
    return sum(weight.numel() for layer in layers for weight in layer.parameters(recurse=False))


def row(size: str, process: Process, answers: Sequence[dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """The medians of the rounds, and the rounds."""
    seconds, tokens = [answer["seconds"]["all"] for answer in answers], process.job.counts["tokens"]
    speed = tokens / median(seconds)
    return {
        "size": size,
        "contender": process.name,
        "versions": process.versions,
        "tokens_per_second": speed,
        "spread": [tokens / max(seconds), tokens / min(seconds)],
        "of_limit": speed / limits[parts(process.name)[1]],
        "peak_mib": answers[-1]["peak_mib"],
        "tokens": tokens,
        "seconds": seconds,
    }


def in_table(row: dict[str, Any]) -> dict[str, Any]:
    slowest, fastest = row["spread"]
    return {
        **row, "tokens/s": round(row["tokens_per_second"]), "slowest": round(slowest), "fastest": round(fastest),
        "x ours": row["times_ours"], "of limit": row["of_limit"], "peak MiB": round(row["peak_mib"]),
    }  # fmt: skip


def write(size: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    about = {
        "benchmark": "rollout",
        **stamp("triton", device=arguments.device),
        "threads": arguments.threads,
        "seed": SEED,
    }
    file = arguments.output / f"rollout-{size}-{about['device']}.json"
    file.write_text(json.dumps({**about, "settings": vars(SIZES[size]), **result}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
