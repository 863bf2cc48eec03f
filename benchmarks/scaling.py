"""The cost of one PPO iteration against batch, lengths, vocabulary, width and depth, one of them at a time.

    python benchmarks/scaling.py                    # on the CPU, all six
    python benchmarks/scaling.py --against width    # one of them
    python benchmarks/scaling.py --gpu              # larger ranges, at most 6 minutes

Fits an exponent to the seconds of each phase and to the peak memory. Prints one table of them, writes
benchmarks/results/scaling-DEVICE.json and draws scaling-DEVICE.png.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.contender_process import (  # noqa: E402
    Failed,
    Process,
    add_options,
    by_turns,
    environment,
    parsed_options,
)
from benchmarks.contenders.protocol import PPOJob  # noqa: E402
from benchmarks.kernels import table  # noqa: E402
from benchmarks.ppo_sizes import Size, llama, write_model  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402

SEED = 0
HEAD_WIDTH = 64
COSTS = ("generate", "score", "update", "all", "memory")


@dataclass(frozen=True)
class Shape:
    """An iteration of one epoch: prompts and the tokens of each and of its response; the model's."""

    batch: int
    prompt: int
    response: int
    vocabulary: int
    width: int
    depth: int

    def size(self, minibatch_size: int) -> Size:
        heads = self.width // HEAD_WIDTH
        return Size(
            "llama", llama(self.depth, self.width, 4 * self.width, heads, heads), self.vocabulary,
            self.batch, self.prompt, self.response, epochs=1, minibatch_size=minibatch_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Ranges:
    """base: what stands still.   values: what each field of it goes through."""

    base: Shape
    minibatch_size: int
    values: Mapping[str, Sequence[int]]


def doubled(base: Shape, minibatch_size: int, num_values: int, **starts: int) -> Ranges:
    """Each field from its start on, doubled for each value more."""
    values = {name: [start << i for i in range(num_values)] for name, start in starts.items()}
    return Ranges(base, minibatch_size, values)


QUICK = doubled(Shape(4, 4, 4, 64, 64, 1), 4, 3, batch=4, prompt=4, response=4, vocabulary=64, width=64, depth=1)
ON_CPU = doubled(
    Shape(16, 32, 48, 8192, 256, 4), 4, 5, batch=4, prompt=16, response=12, vocabulary=2048, width=64, depth=1
)
ON_GPU = doubled(
    Shape(64, 64, 128, 32768, 1024, 4), 16, 5,
    batch=16, prompt=64, response=32, vocabulary=8192, width=256, depth=2,
)  # fmt: skip
# All that it holds beside the libraries is too small to be seen.
NOTHING = Shape(4, 2, 2, 64, 64, 1)


def main() -> None:
    arguments = parsed()
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    ranges = QUICK if arguments.quick else ON_GPU if arguments.gpu else ON_CPU
    libraries = measured({0: NOTHING}, ranges.minibatch_size, arguments, began)[0]["peak_mib"]
    series = {}
    for number, name in enumerate(arguments.against, 1):
        # Each has its share of the time.
        deadline = began + arguments.limit * number / len(arguments.against)
        shapes = {value: replace(ranges.base, **{name: value}) for value in ranges.values[name]}
        points = measured(shapes, ranges.minibatch_size, arguments, deadline)
        for point in points:
            point["memory"] = point["peak_mib"] - libraries
        series[name] = {"points": points, "exponents": exponents(points)}
    result = {"base": asdict(ranges.base), "minibatch_size": ranges.minibatch_size, "libraries_mib": libraries}
    if not arguments.quick:
        write({**result, "series": series}, arguments)
    print("exponents of all values and, behind the bar, of the upper half; with their standard errors")
    print(table([in_table(name, one) for name, one in series.items()], ["against", "from", "to", *COSTS]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, list(ON_CPU.values)
    add("--against", nargs="+", choices=names, default=names, help="what is varied; default: all")
    add("--options", nargs="+", metavar="KEY=VALUE", help="settings of HybridConfig; with --gpu: "
        "model.precision=bfloat16")  # fmt: skip
    add_options(parser, rounds=3, of="iterations")
    arguments = parsed_options(parser)
    arguments.options = arguments.options or (["model.precision=bfloat16"] if arguments.gpu else [])
    return arguments


def measured(
    shapes: Mapping[int, Shape], minibatch_size: int, arguments: argparse.Namespace, deadline: float
) -> list[dict[str, Any]]:
    """A point for each value that runs, all by turns; says which do not, and why.

    Each is a process of its own, whose peak memory is its own.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        jobs = {
            value: job(shape.size(minibatch_size), Path(folder), arguments) for value, shape in shapes.items()
        }  # fmt: skip
        begun = [pool.submit(started, value, one, Path(folder), arguments) for value, one in jobs.items()]
        processes = [process for future in begun if (process := future.result()) is not None]
        answers = by_turns(processes, arguments.rounds, deadline)
        for process in processes:
            process.close()
    return [
        point(value, answers[str(value)]) for value in shapes if str(value) in answers
    ]  # fmt: skip


def job(size: Size, folder: Path, arguments: argparse.Namespace) -> PPOJob:
    """The job, with its model's files in the folder; sizes of the same model share them."""
    model = folder / "-".join(map(str, (size.vocabulary, *size.shape.values())))
    if not model.is_dir():
        write_model(model, size, seed=SEED, device=arguments.device)
    return PPOJob(
        str(model), size.prompts(SEED), size.response_length, size.epochs, size.minibatch_size,
        arguments.device, SEED, tuple(arguments.options),
    )  # fmt: skip


def started(value: int, job: PPOJob, folder: Path, arguments: argparse.Namespace) -> Process | None:
    try:
        process = Process(
            str(value), "ppo_ours.py", job, python=sys.executable,
            environment=environment(arguments.threads), log=folder / f"{value}.log",
        )  # fmt: skip
        if arguments.gpu:
            # Compiling and loading kernels takes many seconds of one core: all at once, for a GPU's machine has some.
            process.iteration()
    except Failed as failed:
        print(f"{value} is left out: {failed}")
        return None
    return process


def point(value: int, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, and the rounds."""
    seconds = [answer["seconds"] for answer in answers]
    medians = {phase: median(one[phase] for one in seconds) for phase in seconds[0]}
    return {"value": value, **medians, "peak_mib": answers[-1]["peak_mib"], "rounds": seconds}


def exponents(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """For each cost [slope, standard error] of all points and of the upper half of their range."""
    upper = points[len(points) // 2 :]
    return {
        cost: {
            part: list(power([point["value"] for point in some], [point[cost] for point in some]))
            for part, some in (("all", points), ("upper", upper))
        }
        for cost in COSTS
    }


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """The b of y = a x^b by least squares in the logarithms, and its standard error; None where it cannot be had."""
    if len(x) < 2 or min(y) <= 0:
        return None, None
    u, v = [math.log(one) for one in x], [math.log(one) for one in y]
    spread = sum((one - fmean(u)) ** 2 for one in u)
    slope = sum((a - fmean(u)) * (b - fmean(v)) for a, b in zip(u, v, strict=True)) / spread
    rest = sum((b - fmean(v) - slope * (a - fmean(u))) ** 2 for a, b in zip(u, v, strict=True))
    return slope, math.sqrt(rest / (len(x) - 2) / spread) if len(x) > 2 else None


def in_table(name: str, series: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        cost: " | ".join(f"{written(slope)} ± {written(error)}" for slope, error in parts.values())
        for cost, parts in series["exponents"].items()
    }
    values = [point["value"] for point in series["points"]]
    return {"against": name, "from": values[0], "to": values[-1], **cells}


def written(number: float | None) -> str:
    return "?" if number is None else f"{number:.2f}"


def write(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    about = {
        "benchmark": "scaling",
        **stamp("triton", device=arguments.device),
        "threads": arguments.threads,
        "seed": SEED,
        "options": arguments.options,
    }
    file = arguments.output / f"scaling-{about['device']}.json"
    file.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    draw(result, file.with_suffix(".png"))
    print(f"wrote {file} and {file.with_suffix('.png').name}")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """For each that is varied a panel of the phases' seconds and one of the memory, with the upper half's exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series, base = result["series"], result["base"]
    figure, panels = pyplot.subplots(
        2, len(series), figsize=(3 * len(series) + 1, 6), sharey="row", sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (name, one), column in zip(series.items(), panels.T, strict=True):
        values = [point["value"] for point in one["points"]]
        for axes, costs in zip(column, (("generate", "score", "update"), ("memory",)), strict=True):
            for cost in costs:
                slope, _ = one["exponents"][cost]["upper"]
                axes.plot(values, [point[cost] for point in one["points"]], "o-", markersize=4,
                          label=f"{cost} {written(slope)}")  # fmt: skip
            axes.axvline(base[name], color="grey", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values], fontsize=7, rotation=30)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, title="exponent, upper half", title_fontsize=7)
        column[0].set_title(name)
    panels[0][0].set_ylabel("seconds an iteration")
    panels[1][0].set_ylabel("peak MiB beside the libraries")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
