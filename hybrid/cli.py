"""The command line: `hybrid demo | train | generate | eval | export | reward | memory | datastore | report`."""

import argparse
import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hybrid.config import HybridConfig
from hybrid.core import InputError, RunStopped
from hybrid.data import read_rows
from hybrid.datastore import CAPACITY, build_datastore
from hybrid.distributed import first_speaks, run_processes
from hybrid.export import export
from hybrid.fused import kernel_backend
from hybrid.memory import KeyDtype, memory_tables, read_memory
from hybrid.mixing import make_strategy
from hybrid.optim import listing, listing_markdown
from hybrid.resume import resumable, trained_config
from hybrid.rewards import RewardError, json_spec, make_reward, reward_listing, reward_markdown, reward_schema
from hybrid.run import (
    CONFIG,
    EXPORT,
    comparison_table,
    finished_step,
    summary,
    summary_table,
    write_comparison,
    write_report,
)
from hybrid.scoring import (
    COLUMNS,
    check_columns,
    component_table,
    output_file,
    sample_table,
    score_rows,
    scored_rows,
    write_rows,
)
from hybrid.trainer import HybridTrainer

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the thing was done, 2 for bad input, 1 for a run that had to stop (one line says why), and
    128 + the signal's number (SIGINT 130, SIGTERM 143) for one that a signal ended, with its checkpoint saved."""
    args = _parser().parse_args(argv)
    _quiet_libraries()
    try:
        return args.command(args) or 0
    except InputError as error:
        first_speaks()
        print(f"hybrid: {error}", file=sys.stderr)
        return 2
    except (RewardError, RunStopped) as error:
        first_speaks()
        # What the user's own function raised keeps its traceback.
        if error.__cause__ is not None and not isinstance(error.__cause__, RewardError):
            traceback.print_exception(error.__cause__)
        said = [str(error), *getattr(error, "__notes__", [])]
        print("hybrid:", ". ".join(text.rstrip(".") for text in said), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hybrid: stopped", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Keep loading bars and retry notices out of our own lines; what fails still says so."""
    import huggingface_hub
    from transformers.utils import logging

    logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hybrid", description="SFT and PPO on one language model, in one loop.")
    # deepspeed's launcher puts it before all else; the variable LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="teach a small model to write reviews, then to like things")
    demo.add_argument("--output", metavar="FOLDER", help="default: runs/demo, or the next free runs/demo-N")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--model", help="smollm2, or a model's folder, instead of the built-in model")
    demo.set_defaults(command=_demo)

    train = commands.add_parser("train", help="run a config: evaluate, train, evaluate, report")
    train.add_argument("config", nargs="?", help="a YAML or JSON file")
    _add_overrides(train)
    train.add_argument("--resume", metavar="RUN", help="go on with a stopped run from its newest whole checkpoint")
    train.add_argument("--nproc", type=int, default=1, metavar="N", help="in so many processes, by torchrun")
    train.set_defaults(command=_train)

    generate = commands.add_parser("generate", help="answer prompts with a trained run or any model")
    generate.add_argument("model", help="a run's folder, a model's folder or a hub name")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    generate.set_defaults(command=_generate)

    evaluate = commands.add_parser("eval", help="the held-out measures of a run, a checkpoint, or a config's model")
    evaluate.add_argument("config", help="a run's folder, one of its checkpoints, or a YAML or JSON file")
    _add_overrides(evaluate)
    evaluate.set_defaults(command=_eval)

    exported = commands.add_parser("export", help="write a run's model as a plain transformers folder with its card")
    exported.add_argument("run", metavar="RUN", help="a run's folder")
    exported.add_argument("folder", metavar="DIR", help="where to write it")
    exported.add_argument("--checkpoint", metavar="NAME", help="best, newest or step-N (default: the run's own export)")
    exported.set_defaults(command=_export)

    reward = commands.add_parser("reward", help="score a file of responses; list the types; print their JSON Schema")
    reward.add_argument("spec", nargs="?", metavar="SPEC", help="a JSON or YAML file, or the JSON itself")
    reward.add_argument("file", nargs="?", metavar="FILE", help="the responses: JSONL, JSON, CSV, Parquet, ...")
    for role, column in COLUMNS.items():
        reward.add_argument(f"--{role}", default=column, metavar="COLUMN", help=f"default: {column}")
    reward.add_argument("--output", metavar="FILE", help="write every row with its scores, .jsonl or .csv")
    reward.add_argument("--rows", type=int, default=20, help="how many rows to show (default: 20)")
    reward.add_argument("--list", action="store_true", help="every type with its parameters and defaults")
    reward.add_argument("--markdown", action="store_true", help="with --list: as docs/rewards.md has it")
    reward.add_argument("--schema", action="store_true", help="the JSON Schema of a spec")
    reward.set_defaults(command=_reward)

    memory = commands.add_parser("memory", help="what a run has learnt of its prompts: classes, hardest, best answers")
    memory.add_argument("run", metavar="RUN", help="a run's folder, or its memory.jsonl")
    memory.add_argument("--rows", type=int, default=8, help="how many prompts of each kind to show (default: 8)")
    memory.set_defaults(command=_memory)

    store = commands.add_parser("datastore", help="write what decoder knn remembers: a text's hidden states and tokens")
    store.add_argument("model", help="a run's folder, a model's folder or a hub name")
    store.add_argument("data", help="any data that data.train takes")
    store.add_argument("folder", metavar="DIR", help="where to write it")
    _add_overrides(store)
    store.add_argument("--dtype", choices=get_args(KeyDtype), default="float16", help="of the keys (default: float16)")
    store.add_argument("--capacity", type=int, default=CAPACITY, help=f"the most tokens (default: {CAPACITY:,})")
    store.add_argument("--index", action="store_true", help="prepare it for search: faiss")
    store.set_defaults(command=_datastore)

    for kind in ("optimizers", "schedulers"):
        names = commands.add_parser(kind, help=f"the {kind} by name, with their keys and defaults")
        names.add_argument("--markdown", action="store_true", help="as docs/optimizers.md has it")
        names.set_defaults(command=_names, kind=kind)

    report = commands.add_parser("report", help="write a run's report.html anew; or compare runs on one page")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; of several, a comparison")
    report.add_argument("--output", default="comparison.html", metavar="FILE", help="of a comparison")
    report.set_defaults(command=_report)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. ppo.epochs=2 optimizer.lr=1e-5")


def _demo(args: argparse.Namespace) -> int:
    from hybrid.demo import run_demo

    return _ended(run_demo(output=args.output, seed=args.seed, model=args.model))


def _train(args: argparse.Namespace) -> int:
    if args.resume is not None:
        overrides = [*([args.config] if args.config else []), *args.overrides]
        return _resume(Path(args.resume), overrides, args.nproc)
    if args.config is None:
        raise InputError("train takes a CONFIG, or --resume RUN")
    # Refused here, what is wrong is said once.
    config = HybridConfig.from_file(args.config, args.overrides)
    if config.run.output is None:
        config = replace(config, run=replace(config.run, output=f"runs/{Path(args.config).stem}"))
    if config.data.train is None:
        raise InputError("config: data.train is missing; give a file or a Hugging Face dataset")
    config.check_training(make_strategy(config.mixing))
    if args.nproc != 1:
        return run_processes(args.nproc, ["train", args.config, *args.overrides])
    return _run(HybridTrainer(_model_name(config), config=config))


def _resume(folder: Path, overrides: Sequence[str], nproc: int) -> int:
    if any("=" not in override for override in overrides):
        raise InputError("train takes a CONFIG or --resume RUN, whose config is in its folder")
    if (step := finished_step(folder)) is not None:
        if overrides:
            raise InputError(
                f"{folder} is finished after step {step}: nothing is left that {' '.join(overrides)} could change; "
                f"start a new run, with model.name={folder / EXPORT} to go on from its weights"
            )
        print(f"{folder} is finished after step {step}: nothing is left of it")
        _show(folder)
        return 0
    if nproc != 1:
        resumable(folder, overrides)
        return run_processes(nproc, ["train", "--resume", str(folder), *overrides])
    return _run(HybridTrainer.resume(folder, overrides))


def _run(trainer: HybridTrainer) -> int:
    print(f"device: {trainer.policy.device}, kernels: {kernel_backend(trainer.policy.device)}, {trainer.world}")
    trainer.train()
    return _ended(trainer)


def _ended(trainer: HybridTrainer) -> int:
    """Show what a run left behind; its exit status."""
    assert trainer.folder is not None
    if trainer.world.writes:
        _show(trainer.folder)
    return 0 if trainer.stopped_by is None else 128 + trainer.stopped_by


def _generate(args: argparse.Namespace) -> None:
    config = _answering(args.model, args.overrides)
    # Neither data nor a reward that nothing asks: the saved config says how a prompt is put.
    data = replace(config.data, train=None, eval=None, eval_fraction=0.0)
    reward = config.reward if config.sampling.search.needs_reward else None
    config = replace(config, data=data, reward=reward, references=(), eval=replace(config.eval, decoder=None))
    trainer = HybridTrainer(_model_name(config), config=config)
    for prompt, response in zip(args.prompts, trainer.generate(args.prompts), strict=True):
        print(f"{prompt}\n→ {response.strip()}\n")


def _answering(model: str, overrides: Sequence[str]) -> HybridConfig:
    """The config of a run with the model that it exported, or of a model by its name."""
    if (Path(model) / CONFIG).is_file():
        return trained_config(Path(model), overrides)
    return HybridConfig.from_dict({"model": {"name": model}}, overrides)


def _eval(args: argparse.Namespace) -> None:
    path = Path(args.config)
    config = trained_config(path, args.overrides) if path.is_dir() else HybridConfig.from_file(path, args.overrides)
    trainer = HybridTrainer(_model_name(config), config=replace(config, run=replace(config.run, output=None)))
    metrics = trainer.evaluate()
    if not metrics:
        raise InputError(f"nothing to evaluate: {str(path)!r} names no held-out data (data.eval or data.eval_fraction)")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4f}")


def _export(args: argparse.Namespace) -> None:
    folder = export(args.run, args.folder, checkpoint=args.checkpoint)
    print(f"exported to {folder}; publish it with: hf upload NAME {folder}")


def _report(args: argparse.Namespace) -> None:
    if len(args.runs) == 1:
        write_report(args.runs[0])
        _show(Path(args.runs[0]))
        return
    from rich.console import Console

    page = write_comparison(args.runs, args.output)
    Console().print(comparison_table(args.runs))
    print(f"comparison: {page}")


def _reward(args: argparse.Namespace) -> None:
    if args.schema:
        print(json.dumps(reward_schema(), indent=2))
    elif args.list and args.markdown:
        print(reward_markdown())
    elif args.list:
        _table(("type", "parameters (defaults)", ""), reward_listing())
    elif args.spec is None or args.file is None:
        raise InputError("reward takes a SPEC and a FILE, or --list, or --schema")
    else:
        _score_file(args)


def _score_file(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise InputError(f"--rows must be at least 0, got {args.rows}")
    reward = make_reward(
        json_spec(args.spec, f"the spec {args.spec[:80]!r}") if args.spec.lstrip().startswith("{") else args.spec
    )
    if args.output is not None:
        output_file(args.output)
    rows = read_rows(args.file)
    if args.output is not None:
        check_columns(rows)
    columns = {role: getattr(args, role) for role in COLUMNS}
    output = score_rows(reward, rows, columns)
    if args.output is not None:
        write_rows(args.output, scored_rows(rows, output))
    _table(*sample_table(rows, output, columns["response"], num_rows=args.rows))
    _table(*component_table(output), wrap=False)


def _memory(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise InputError(f"--rows must be at least 0, got {args.rows}")
    for table in memory_tables(read_memory(args.run), args.rows):
        print(table.title)
        _table(table.header, table.rows)


def _datastore(args: argparse.Namespace) -> None:
    overrides = [f"data.train={json.dumps(args.data)}", *args.overrides]
    config = _answering(args.model, overrides)
    store = build_datastore(config, args.folder, dtype=args.dtype, capacity=args.capacity, index=args.index)
    size = sum(file.stat().st_size for file in store.folder.iterdir())
    print(f"{args.folder}: {len(store):,} tokens, {store.info.hidden_size} numbers each, {size / 2**20:.1f} MiB")


def _names(args: argparse.Namespace) -> None:
    if args.markdown:
        print(listing_markdown(args.kind))
    else:
        _table(("name", "keys (defaults)", ""), listing(args.kind))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: bool = True) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=not wrap)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _show(folder: Path) -> None:
    """A run's table on the console, and where its report is."""
    from rich.console import Console

    Console().print(summary_table(summary(folder)))
    print(f"report: {folder / 'report.html'}")


def _model_name(config: HybridConfig) -> str:
    if config.model.name is None:
        raise InputError("config: model.name is missing; give a model's folder or hub name")
    return config.model.name


if __name__ == "__main__":
    sys.exit(main())
