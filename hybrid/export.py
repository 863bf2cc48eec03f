"""A trained model as others take it: a plain transformers folder with a model card, ready for the Hugging Face Hub."""

import re
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import InputError
from hybrid.data import prompt_text
from hybrid.learner import Learner
from hybrid.mixing import make_strategy
from hybrid.models import VALUE_HEAD_FILE, Policy, save_reward_model, template_of
from hybrid.resume import trained_config
from hybrid.run import CHECKPOINTS, CONFIG, EXPORT, Checkpoints, Summary, disk_errors, filled_folder, summary
from hybrid.run.panels import called
from hybrid.run.report import rows_of
from hybrid.setup import build_policy, load_tokenizer

__all__ = ["export", "export_policy", "export_run", "model_card"]

CARD = "README.md"
STATISTICS = {"score_mean": "reward_mean", "score_std": "reward_std"}
REWARD_MODEL = "reward_model"  # the folder in a run's
PACKAGES = ("hybrid-trainer", "torch", "transformers", "peft", "bitsandbytes")
JUDGING = f"""from hybrid import RewardModel

judge = RewardModel.from_pretrained("{REWARD_MODEL}")
print(judge.score(["An answer", "Another one"], prompts=["Your prompt", "Your prompt"]))
"""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%-]+)?")


def export(run: str | Path, folder: str | Path, *, checkpoint: str | None = None) -> Path:
    """Write a run's model to `folder` as `export_policy` does. Returns the folder.

    checkpoint: "best" (by `eval.metric`), "newest", or "step-N"; None: what the run itself exported last.
    Raises InputError where there is no such model, or `folder` holds something that is no export.
    """
    run, folder = Path(run), Path(folder)
    if not (run / CONFIG).is_file():
        raise InputError(f"{str(run)!r} holds no run: it has no {CONFIG}")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held and not {CARD, VALUE_HEAD_FILE} <= held:
        raise InputError(f"cannot export to {str(folder)!r}: it holds something else; name a new folder")
    if checkpoint is None:
        if not (run / EXPORT).is_dir():
            raise InputError(f"{str(run)!r} has exported nothing yet; export a checkpoint with --checkpoint newest")
        if not any((run / EXPORT).glob("model*.safetensors")):
            raise InputError(f"{str(run / EXPORT)!r} has no weights; export a checkpoint with --checkpoint newest")
        for source, there in ((run / EXPORT, folder), (run / REWARD_MODEL, folder / REWARD_MODEL)):
            if source.is_dir():
                with filled_folder(there, stale=("model*.safetensors*",)) as temporary:
                    shutil.copytree(source, temporary, dirs_exist_ok=True)
        return folder
    source = _checkpoint(run, checkpoint)
    step, of_run = Checkpoints.verify(source)["step"], HybridConfig.from_file(run / CONFIG)
    card = model_card(run, of_run, step=step)
    model = trained_config(source).model
    assert model.name is not None
    policy, tokenizer = build_policy(model.name, model), load_tokenizer(model.name)
    export_policy(policy, tokenizer, folder, card=card)
    if policy.reward_head is not None:
        own = of_run.data if of_run.preference_data.train is None else of_run.preference_data
        template = template_of(own, tokenizer)
        # As the run measured them at that step; there may have been no evaluation then.
        measured = next((row for row in reversed(rows_of(run, until=step)["eval"]) if row["step"] == step), {})
        found = {name: measured[f"reward_model/{name}"] for name in STATISTICS if f"reward_model/{name}" in measured}
        save_reward_model(
            policy, folder / REWARD_MODEL, tokenizer=tokenizer, chat_template=template, statistics=_statistics(found)
        )
    return folder


def export_run(learner: Learner) -> None:
    """Write the model of a run that goes on, or ends, to `export` in its folder; a reward head's to `reward_model`."""
    folder = learner.folder
    assert folder is not None
    with learner.world.gathered():
        learner.world.main(lambda: _export_run(learner, folder))


def _export_run(learner: Learner, folder: Path) -> None:
    card = model_card(folder, learner.config, step=learner.num_steps)
    export_policy(learner.policy, learner.tokenizer, folder / EXPORT, card=card)
    if learner.reward_template is not None:
        export_reward_model(learner, folder / REWARD_MODEL)


def export_reward_model(learner: Learner, folder: Path) -> None:
    """Write trunk and reward head as a sequence classifier, with the mean and deviation of held-out scores."""
    found = learner.objectives["reward_model"].evaluate(
        learner.corpus.held_out_preferences[: learner.config.eval.num_examples], learner.config.eval.batch_size
    )
    assert learner.reward_template is not None
    save_reward_model(
        learner.policy, folder, tokenizer=learner.tokenizer, chat_template=learner.reward_template,
        statistics=_statistics(found.metrics),
    )  # fmt: skip


def _statistics(measured: Mapping[str, float]) -> dict[str, float]:
    """What config.json calls the measures of a reward model's held-out scores."""
    return {name: measured[measure] for measure, name in STATISTICS.items() if measure in measured}


def export_policy(policy: Policy, tokenizer: Any, folder: str | Path, *, card: str) -> None:
    """Write weights (an adapter merged into them), value head, tokenizer, configs and the card README.md.

    Nothing is written there before all of it is complete.
    """
    saving = disk_errors(f"export to {str(folder)!r}")
    with saving, filled_folder(folder, stale=("model*.safetensors*",)) as temporary:
        policy.save_pretrained(temporary, tokenizer=tokenizer)
        (temporary / CARD).write_text(card, "utf-8")


def model_card(run: str | Path, config: HybridConfig, *, step: int) -> str:
    """The card of a run's model after `step` steps: where it comes from, how it was trained, what it measured.

    config: the run's.   The metadata names what is on the Hub; of a path on this machine the card has the last part.
    """
    import yaml

    run, values = Path(run), config.written()
    rows = rows_of(run, until=step)
    steps = {phase: len(of_phase) for phase, of_phase in rows.items() if of_phase and phase != "eval"}
    objectives = make_strategy(config.mixing).objectives
    own = sorted(objectives.difference(steps, ("sft", "ppo")))
    base, own_pairs = values["model"]["name"], values["preference_data"]["train"] is not None
    hub_data = _hub_names(values["data"]["train"]) + (
        _hub_names(values["preference_data"]["train"]) if own_pairs else []
    )
    metadata = {
        "base_model": _hub_names(base),
        "datasets": [name for name in hub_data if not Path(name).suffix],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hybrid-trainer", *steps, *own, *(["lora"] if config.model.lora else [])],
    }
    if objectives == {"reward_model"}:
        # The weights of this folder are the trunk of a judge: they are not trained to write.
        del metadata["pipeline_tag"]
    front = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False)
    taken = ", ".join(f"{count} {phase}" for phase, count in steps.items())
    sections = ["model", "data", "references", "mixing", "optimizer", "reward", "sampling"]
    sections += [*(["preference_data"] if own_pairs else []), *(["objectives"] if values["objectives"] else [])]
    training = {key: values[key] for key in sections}
    settings = yaml.safe_dump(_named(training), sort_keys=False, allow_unicode=True)
    found = {package: _version(package) for package in PACKAGES}
    parts = [
        f"---\n{front}---",
        f"# {run.resolve().name}",
        f"{_named(base) or 'A model'}, trained with HybridTrainer: {_methods(objectives)}. "
        f"Steps: {taken or 'none'}; seed {config.run.seed}.",
        f"## Use\n\n{_use(config, objectives)}",
        f"`{VALUE_HEAD_FILE}` is the value head: `hybrid.Policy.from_pretrained` reads it, transformers needs it not.",
        f"## Held-out evaluation\n\n{_evaluation(summary(run, until=step))}",
        f"## Training\n\n```yaml\n{settings}```",
        "## Versions\n\n" + ", ".join(f"{package} {number}" for package, number in found.items() if number),
    ]
    return "\n\n".join(parts) + "\n"


def _methods(objectives: Collection[str]) -> str:
    """What the run did, in words: "supervised fine-tuning and PPO in one loop with one optimizer"."""
    first = [name for name in ("sft", "ppo") if name in objectives]
    names = [*first, *sorted(set(objectives).difference(first))]
    called_here = {"sft": "supervised fine-tuning", "reward_model": "reward modelling"}
    methods = [called_here.get(name) or called(name) for name in names]
    listed = " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else methods)
    return listed + (" in one loop with one optimizer" if len(methods) > 1 else "")


def _use(config: HybridConfig, objectives: Collection[str]) -> str:
    """How the model is used: as a judge where it has a reward head, and to write unless it is nothing else."""
    writes = f"```python\n{_usage(config)}```"
    if "reward_model" not in objectives:
        return writes
    judges = (
        f"The folder `{REWARD_MODEL}`, beside this one in the run and inside it where `hybrid export` wrote it, is the "
        f"reward model, a plain `AutoModelForSequenceClassification`.\n\n```python\n{JUDGING}```"
    )
    if set(objectives) == {"reward_model"}:
        return (
            f"{judges}\n\nThe weights of this folder are its trunk as a language model, which was not trained to write."
        )
    return f"{writes}\n\n{judges}"


def _usage(config: HybridConfig) -> str:
    """Python that answers a prompt as the run did."""
    sampling, options = config.sampling, "do_sample=False"
    if sampling.temperature:
        # transformers' own default is top_k=50.
        options = f"do_sample=True, temperature={sampling.temperature}, top_k={sampling.top_k}, top_p={sampling.top_p}"
    prompt = f"prompt = {prompt_text('Your prompt', config.data.template)!r}"
    if config.data.template == "chat":
        told = [{"role": "system", "content": config.data.system}] if config.data.system else []
        messages = [*told, {"role": "user", "content": "Your prompt"}]
        prompt = f"prompt = tokenizer.apply_chat_template({messages}, tokenize=False, add_generation_prompt=True)"
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
{prompt}
inputs = tokenizer(prompt, return_tensors="pt"{", add_special_tokens=False" if config.data.template == "chat" else ""})
answer = model.generate(**inputs, max_new_tokens={sampling.max_new_tokens}, {options})
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""


def _evaluation(measured: Summary) -> str:
    if not measured.steps:
        return "None was made."
    columns = ["", *(f"step {step}" for step in measured.steps), *(["change"] if len(measured.steps) == 2 else [])]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[f"{row.name}, {row.unit}", *row.values, row.change][: len(columns)] for row in measured.rows]
    made_on = f"\n\n{measured.held_out}." if measured.held_out else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + made_on


def _hub_names(names: str | list[str] | None) -> list[str]:
    """Those that can be names on the Hub: no file or folder of this machine. A data set's split is left out."""
    listed = [names] if isinstance(names, str) else names or []
    return [name.partition(":")[0] for name in listed if HUB_NAME.fullmatch(name) and not Path(name).exists()]


def _named(value: Any) -> Any:
    """The value with every path in it cut down to its last part."""
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _checkpoint(run: Path, which: str) -> Path:
    """The folder of the checkpoint called "best", "newest" or "step-N"."""
    config = HybridConfig.from_file(run / CONFIG)
    checkpoints = Checkpoints(run / CHECKPOINTS, best=config.eval.best)
    named = {"best": checkpoints.best, "newest": checkpoints.newest}
    source = named[which]() if which in named else run / CHECKPOINTS / which
    if source is None or not source.is_dir():
        there = sorted(path.name for path in (run / CHECKPOINTS).glob("step-*"))
        raise InputError(f"{str(run)!r} has no checkpoint {which!r}; known: {', '.join(['best', 'newest', *there])}")
    return source


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
