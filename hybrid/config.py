"""The whole configuration of a run: the rooms' own dataclasses, composed, and how a file becomes one."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hybrid.core import InputError, check_seed, first_line, parse_yaml, unknown_name
from hybrid.data import DataConfig
from hybrid.distributed import DistributedConfig
from hybrid.evaluate import EvalConfig
from hybrid.memory import check_memory
from hybrid.mixing import Strategy, make_strategy
from hybrid.model_config import ModelConfig, ReferenceConfig
from hybrid.objectives import (
    GradientConfig,
    PPOConfig,
    PreferencesConfig,
    SFTConfig,
    check_decoder,
    check_objectives,
    objective_class,
)
from hybrid.optim import check_optimizer, check_scheduler, plateau_mode
from hybrid.rollout import CollectOptions, Decoder, KLConfig, RolloutConfig, SamplingConfig, ScoreConfig
from hybrid.run import CheckpointConfig, write_file

__all__ = ["HybridConfig", "ModelConfig", "ReferenceConfig", "RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, and its seed."""

    output: str | None = None  # folder; None: nothing is written
    seed: int = 0
    trackers: tuple[str, ...] = ()  # of tensorboard, wandb, mlflow, trackio; the folder's own files are always written

    def __post_init__(self) -> None:
        if self.output is not None:
            object.__setattr__(self, "output", str(self.output))
        check_seed("RunConfig.seed", self.seed)


@dataclass(frozen=True)
class HybridConfig:
    """Everything a run is made of. `from_file` reads YAML or JSON; every section and key may be left out.

    reward, mixing, memory, optimizer and scheduler are plug-ins: a mapping with a name and that thing's own keys
    (`make_reward`, `make_strategy`, `make_optimizer`, `make_scheduler`, `make_memory`).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    references: tuple[ReferenceConfig, ...] = (ReferenceConfig(),)
    data: DataConfig = field(default_factory=DataConfig)
    ptx_data: DataConfig = field(default_factory=DataConfig)  # a second data set, which strategy ptx trains on
    preference_data: DataConfig = field(default_factory=DataConfig)  # of the objectives of preferences; none: `data`
    reward: Any = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    mixing: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)  # which prompts come again; none: as the data have them
    objectives: dict[str, Any] = field(default_factory=dict)  # by name, the settings of those without a section
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            plain: Any = get_origin(section.type) or section.type
            value = getattr(self, section.name)
            if plain is not Any and not isinstance(value, plain):
                raise InputError(
                    f"config: section {section.name!r} must be a {plain.__name__}, got {value!r:.60}; "
                    "HybridConfig.from_dict takes nested mappings"
                )
        if self.rollout.needs_correction and self.ppo.importance is None:
            object.__setattr__(self, "ppo", replace(self.ppo, importance="token"))
        self.rollout.check_ahead(self.sampling, self.memory)
        check_memory(self.memory)
        check_objectives(self.objectives, {section.name for section in fields(self)})
        self._check_sections(make_strategy(self.mixing))
        check_optimizer(self.optimizer)
        check_scheduler(self.scheduler)
        metric, better = self.eval.best
        if plateau_mode(self.scheduler) not in (None, better):
            raise InputError(f"scheduler.MODE must be {better!r}, which is the better end of eval.metric {metric!r}")
        for number, reference in enumerate(self.references if self.model.lora else ()):
            if reference.model is None and (reference.device, reference.dtype) != (None, None):
                raise ValueError(
                    f"references[{number}] is the policy's own model with the adapter off, which has no device or "
                    "dtype of its own: leave them out, or name a model"
                )

    def _check_sections(self, strategy: Strategy) -> None:
        for name in sorted(strategy.objectives):
            objective_class(name).check_sections(name, vars(self))

    def check_training(self, strategy: Strategy) -> None:
        """Refuse what no run of the strategy can be made with."""
        self._check_sections(strategy)
        metric, objective = self.eval.metric, self.eval.objective
        if objective is not None and objective not in strategy.objectives:
            raise InputError(
                f"config: eval.metric {metric!r} is a measure of objective {objective!r}, which is not in mixing; its "
                f"objectives are {', '.join(sorted(strategy.objectives))}: watch one of theirs, or another metric"
            )
        if self.reward is None and objective is None and metric not in self.eval.measured(with_reward=False):
            raise InputError(f"config: eval.metric {metric!r} needs a reward; give one, or watch another metric")
        for where, decoder in zip(("sampling", "eval"), self.decoders, strict=True):
            if decoder.of_one_policy:
                raise InputError(
                    f"config: {where}.decoder {decoder.name!r} goes with the weights that it was made with, and "
                    "training changes them: train with another, and give this one to hybrid generate and hybrid eval"
                )
        if self.memory and self.reward is None:
            raise InputError("config: memory chooses prompts by their scores, and reward is missing; give one")
        if not strategy.rolls_out:
            return
        if self.reward is None and strategy.needs_reward:
            kinds = {name: objective_class(name) for name in sorted(strategy.objectives)}
            needing = ", ".join(name for name, kind in kinds.items() if kind.rolls_out and kind.needs_reward)
            raise InputError(f"config: reward is missing, which {needing} needs; give one, or leave it out of mixing")
        if not self.sampling.temperature:
            raise InputError("config: sampling.temperature must be > 0: a rollout is learnt from as it was drawn")
        check_decoder(strategy.objectives, self.sampling.search.name, self.sampling.search.policy_window)

    def collect_options(self, kl_coef: float, row_limit: int | None) -> CollectOptions:
        """What `collect` and `assemble` take from the config alike.

        row_limit: rows of PPO's microbatches that the memory has been found to allow; None: any number.
        """
        size = self.ppo.microbatch_size or self.ppo.minibatch_size
        return {  # rows go through the forwards that PPO's first epoch takes them through: its first ratios are 1
            "score": self.score,
            "kl_coef": 0.0 if self.kl.in_loss else kl_coef,
            "kl_kind": self.kl.kind,
            "minibatch_size": self.ppo.minibatch_size,
            "microbatch_size": min(size, row_limit or size),
        }

    def check_rollout(self, strategy: Strategy) -> None:
        """Refuse a rollout that nothing learns from: no objective of the strategy, and none that `objectives` names."""
        if not self.sampling.temperature:
            raise InputError("a rollout needs sampling.temperature > 0: it is learnt from as it was drawn")
        rolling = [name for name in {*strategy.objectives, *self.objectives} if objective_class(name).rolls_out]
        check_decoder(rolling or ["ppo"], self.sampling.search.name, self.sampling.search.policy_window, least=1)

    @property
    def decoders(self) -> tuple[Decoder, Decoder]:
        """That of the training and that of the evaluation."""
        return self.sampling.search, self.eval.sampling(self.sampling).search

    def check_decoders(self, context: int | None, tokenizer: Any) -> None:
        """Refuse decoders that the engine, the reward, the tokenizer or a context of so many tokens (None: not known)
        rules out."""
        for sampling in (self.sampling, self.eval.sampling(self.sampling)):
            self.rollout.check_sampling(sampling)
        for decoder in self.decoders:
            decoder.check_reward(self.reward)
            decoder.check_context(context)
            decoder.check_tokenizer(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> "HybridConfig":
        """Read a YAML or JSON file. overrides: `section.key=value` strings, or a mapping of such keys to values.

        Raises InputError: unknown key (with the nearest one), wrong type, a value out of range.
        """
        return cls.from_dict(read_config(path), overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> "HybridConfig":
        """The config that a nested mapping describes; see `from_file`."""
        if not isinstance(values, Mapping):
            raise InputError(f"a config must be a mapping of sections, got {values!r:.60}")
        merged = _merged(values, overrides)
        _check_keys(cls, merged, "")
        made: HybridConfig = _parsed(cls, merged)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, every default written out; `from_dict` reads them back."""
        # A Reward is a dataclass of its own making: its spec says what it is.
        reward = getattr(self.reward, "spec", None) or self.reward
        return {
            **asdict(replace(self, reward=None)),
            "references": [asdict(reference) for reference in self.references],
            "reward": reward,
        }

    def written(self) -> dict[str, Any]:
        """`to_dict` in the types of YAML and JSON; a function in it by its name, "module:name"."""
        values: dict[str, Any] = _writable(self.to_dict())
        return values

    def save(self, path: Path) -> None:
        """Write the resolved config as YAML."""
        import yaml

        text = yaml.safe_dump(self.written(), sort_keys=False, allow_unicode=True)
        write_file(path, text.encode("utf-8"))


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML)."""
    import yaml

    path = Path(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.absolute().parent.glob("*")])
        raise InputError(
            f"config file {str(path)!r} not found" + (f"; did you mean {near[0]!r}?" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config file {str(path)!r} is not YAML: {_one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # NUL in the name; a number of thousands of digits; too many brackets
        raise InputError(f"config file {str(path)!r} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"config file {str(path)!r} must hold a mapping of sections, got {type(values).__name__}")
    return values


def _merged(values: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `values` with every `a.b=value` set."""
    import copy

    import yaml

    if not isinstance(overrides, Mapping):
        pairs = {}
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise InputError(f"override {text!r} must look like section.key=value")
            try:
                # A leading * is a pattern of files: no override refers to an anchor.
                pairs[key.lstrip("-")] = value if value.startswith("*") else parse_yaml(value)
            except yaml.YAMLError as error:
                raise InputError(f"override {text!r}: {_one_line(error)}") from error
        overrides = pairs
    merged = {section: copy.deepcopy(value) for section, value in values.items()}
    for key, value in overrides.items():
        *sections, last = key.split(".")
        node: Any = merged
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise InputError(f"override {key}={value}: {section!r} is not a section")
        node[last] = value
    # An empty section in YAML is None; only the reward may really be.
    return {key: value for key, value in merged.items() if value is not None or key == "reward"}


def _writable(value: Any) -> Any:
    """The value in types that YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _writable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{value.__module__}:{name}"


def _check_keys(kind: type, values: Any, path: str) -> None:
    """Refuse a key that a dataclass does not have, or a section that is no mapping, with its path."""
    if not isinstance(values, Mapping):
        raise InputError(f"config: section {path.rstrip('.')!r} must be a mapping, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise InputError(
                f"config: unknown key {path + str(key)!r}; "
                + (f"did you mean {path + near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
        hint: Any = known[key].type
        if value is None and type(None) not in (hint, *get_args(hint)) and hint is not Any:
            raise InputError(f"config: {path}{key} is empty; give it a value, or leave it out")
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"config: {path}{key} must be a number, got nan")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"config: {unknown_name(path + key, str(value), [str(arg) for arg in get_args(hint)])}")
        for inner in (kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)):
            if get_origin(hint) is tuple:
                for number, entry in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                    _check_keys(inner, entry, f"{path}{key}[{number}].")
            elif value is not None or inner is hint:
                _check_keys(inner, value, f"{path}{key}.")
                if inner is not hint:
                    # Alone: of a section that may be None jsonargparse would tell what it is not, at length.
                    _parsed(inner, value, f"{path}{key}: ")


def _parsed(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass that a nested mapping describes. where: stands in front of the errors."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"config: {where}{_one_line(error)}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
