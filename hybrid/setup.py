"""From a config to the parts of a trainer; everything that can be refused is refused before a model is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrid.config import HybridConfig, ModelConfig, ReferenceConfig
from hybrid.core import InputError, first_line
from hybrid.corpus import ExampleSets
from hybrid.data import DataConfig, ExampleSet, read_example_set, read_training_sets, split_examples
from hybrid.distributed import World
from hybrid.mixing import make_strategy
from hybrid.models import (
    Policy,
    Reference,
    add_lora,
    check_base,
    check_packing,
    context_length,
    is_adapted,
    recompute_activations,
    under_adapter,
)
from hybrid.optim import check_sharing
from hybrid.rewards import Reward
from hybrid.rollout import check_engine
from hybrid.run import check_trackers

__all__ = [
    "ReferenceLike",
    "build_models",
    "build_policy",
    "check_world",
    "load_tokenizer",
    "model_context",
    "random_streams",
    "read_examples_of",
    "resolved",
]


ReferenceLike = Reference | Policy | str | Path
_NONE = ExampleSet([], "")


def random_streams(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator, torch.Generator]:
    """Random numbers that do not disturb each other: of rollouts, of the order of minibatches, of `generate`."""
    rollouts = torch.Generator(device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    return rollouts, order, torch.Generator(device).manual_seed(seed + 1)


def resolved(
    config: HybridConfig | None,
    policy: Any,
    train_data: Any,
    eval_data: Any,
    reward: Any,
    ptx_data: Any,
    preference_data: Any = None,
) -> HybridConfig:
    """The config with what was given in code put in, so that a run's config.yaml says all that can be written."""
    config = HybridConfig() if config is None else config
    if not isinstance(config, HybridConfig):
        raise InputError(
            f"config must be a HybridConfig, got {type(config).__name__}: HybridConfig.from_dict({{...}}) takes a "
            "mapping, HybridConfig.from_file(...) a file"
        )
    is_model = isinstance(policy, Policy) or (isinstance(policy, nn.Module) and hasattr(policy, "config"))
    if not (policy is None or isinstance(policy, (str, Path)) or is_model):
        raise InputError(f"the policy must be a Policy, a transformers model or a model's name, got {policy!r:.60}")
    check_trackers(config.run.trackers, config.run.output)
    source = config.model.name if policy is None else policy
    if config.rollout.engine != "torch" and source is not None:
        check_engine(config.rollout, _model_config(source))
    ptx = config.ptx_data
    if _is_file_name(ptx_data):
        ptx = replace(ptx, train=_as_text(ptx_data))
    if make_strategy(config.mixing).needs_ptx and ptx_data is None and ptx.train is None:
        raise InputError("config: strategy 'ptx' needs a second data set: give ptx_data.train")
    model = config.model
    if isinstance(policy, (str, Path)):
        model = replace(model, name=str(policy))
    elif policy is not None:
        model = replace(model, name=_name_of(policy) or model.name)
    data = config.data
    if _is_file_name(train_data):
        data = replace(data, train=_as_text(train_data))
    if _is_file_name(eval_data):
        data = replace(data, eval=_as_text(eval_data), eval_fraction=0.0)
    preferences = config.preference_data
    if _is_file_name(preference_data):
        preferences = replace(preferences, train=_as_text(preference_data))
    reward = config.reward if reward is None else reward
    return replace(config, model=model, data=data, ptx_data=ptx, preference_data=preferences, reward=reward)


def _is_file_name(source: Any) -> bool:
    several = isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source)
    return bool(several) or isinstance(source, (str, Path))


def _as_text(source: Any) -> str | list[str]:
    return str(source) if isinstance(source, (str, Path)) else [str(s) for s in source]


def _name_of(policy: nn.Module) -> str:
    """The name that a model in memory was loaded from, "" where there is none."""
    return getattr(policy.backbone.model if isinstance(policy, Policy) else policy, "name_or_path", "")


def check_world(config: HybridConfig, world: World, reward: Reward | None) -> None:
    """Refuse what processes that each step a part of the weights cannot do."""
    if not world.cuts:
        return
    model = config.model
    check_sharing(config.optimizer, world.engine)
    asked = {
        "model.precision float16, whose scaled losses are watched in whole gradients: take bfloat16":
            model.precision == "float16",
        "model.dtype bfloat16, beside which the value head is float32: take float32, or model.lora":
            world.engine == "deepspeed" and model.dtype == "bfloat16" and model.lora is None,
        "model.compile": model.compile,
        "a reward that copies the policy (self_play against itself) or compares its gradients (mixture's controllers "
        "gradient and meta)": not world.whole and reward is not None and reward.needs_whole_policy,
    }  # fmt: skip
    if refused := [what for what, is_asked in asked.items() if is_asked]:
        raise InputError(
            f"config: distributed.engine {world.engine} has a part of the weights in each process, and does not go "
            f"with {refused[0]}; or take distributed.engine ddp"
        )


def load_tokenizer(policy: nn.Module | str | Path, given: Any = None) -> Any:
    """The tokenizer of a model's folder or hub name, or of the model that the policy was loaded from.

    given: the tokenizer itself, or the name that it is loaded by, where it is another.
    """
    from transformers import AutoTokenizer

    if isinstance(given, (str, Path)):
        policy = given
    elif given is not None:
        if not callable(given) or not hasattr(given, "eos_token_id"):
            raise InputError(f"the tokenizer must be a transformers tokenizer or a model's name, got {given!r:.60}")
        return given
    name = _name_of(policy) if isinstance(policy, nn.Module) else str(policy)
    if not name:
        raise InputError("HybridTrainer needs a tokenizer: this policy was not loaded from a folder that has one")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} not found, or it has no tokenizer: {first_line(error)}") from error


def model_context(policy: nn.Module | str | Path) -> int | None:
    """The longest sequence the model takes, read from its config alone; None where that does not say."""
    return context_length(_model_config(policy))


def _model_config(policy: nn.Module | str | Path) -> Any:
    """The transformers config of a model, in memory or by name."""
    from transformers import AutoConfig

    if isinstance(policy, nn.Module):
        return policy.backbone.model.config if isinstance(policy, Policy) else policy.config
    try:
        return AutoConfig.from_pretrained(under_adapter(policy) or str(policy), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model {str(policy)!r} not found: {first_line(error)}") from error


def read_examples_of(
    config: HybridConfig,
    train_data: Any = None,
    eval_data: Any = None,
    ptx_data: Any = None,
    preference_data: Any = None,
    reward: Any = None,
) -> ExampleSets:
    """The examples of a run, from what is given or the config names; none at all is fine.

    Raises InputError where the reward cannot score them.
    """
    seed = config.run.seed
    train, held_out = _read_both(config.data, train_data, eval_data, seed)
    if reward is not None:
        for what, examples in (("training examples", train.examples), ("held-out examples", held_out.examples)):
            targets, items = [e.target for e in examples], [e.item for e in examples]
            reward.check_data(targets, items, what=what, hint="name its column with data.target")
    ptx = config.ptx_data.train if ptx_data is None else ptx_data
    second, _ = (_NONE, _NONE) if ptx is None else read_training_sets(ptx, config.ptx_data, seed=seed, hold_out=False)
    own = config.preference_data
    if own.eval is not None and preference_data is None and own.train is None:
        raise InputError(
            "config: preference_data.eval without preference_data.train: held-out pairs of the training data are "
            "data.eval, or give preference_data.train"
        )
    return ExampleSets(train, held_out, second, *_read_both(own, preference_data, None, seed))


def _read_both(data: DataConfig, train_data: Any, eval_data: Any, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """(training, held-out) examples, from what is given or the config names.

    Training data with splits bring their held-out data along, where neither eval data nor an eval_fraction is given.
    """
    train_data = data.train if train_data is None else train_data
    eval_data = data.eval if eval_data is None else eval_data
    train = held_out = _NONE
    if train_data is not None:
        hold_out = eval_data is None and not data.eval_fraction
        train, held_out = read_training_sets(train_data, data, seed=seed, hold_out=hold_out)
    if eval_data is not None:
        held_out = read_example_set(eval_data, data, seed=seed)
    elif data.eval_fraction and train.examples:
        left, taken = split_examples(train.examples, data.eval_fraction, seed=seed)
        train = replace(train, examples=left)
        held_out = ExampleSet(taken, f" (eval_fraction = {data.eval_fraction} of the same)")
    return train, held_out


def build_models(
    policy: Policy | nn.Module | str | Path,
    reference: ReferenceLike | Sequence[ReferenceLike] | None,
    config: HybridConfig,
    tokenizer: Any,
) -> tuple[Policy, list[Reference]]:
    """The policy and its references, none of which says what the tokenizer has no token for.

    Raises InputError where the whole model is frozen, where an adapter could not be saved alone, where packing is asked
    of a model that cannot keep examples apart, and where the tokenizer has ids that a model has not.
    """
    made = build_policy(policy, config.model)
    if not any(parameter.requires_grad for parameter in made.backbone.parameters()):
        raise InputError("every weight of the model is frozen (requires_grad is False); set model.lora, or unfreeze it")
    if config.run.output is not None and is_adapted(made.backbone.model):
        check_base(made.backbone.model)
    if config.sft.packing:
        check_packing(made.backbone, config.data.max_length)
    references = build_references(reference, config.references, made)
    for backbone in (made.backbone, *(other.backbone for other in references)):
        backbone.fit_vocabulary(tokenizer)
    if config.kl.kind == "full":
        _check_vocabularies(made, references)
    return made, references


def _check_vocabularies(policy: Policy, references: Sequence[Reference]) -> None:
    rows = len(policy.backbone.head_weight)
    for number, reference in enumerate(references):
        if len(reference.backbone.head_weight) != rows:
            raise InputError(
                f"kl.kind 'full' needs a reference with the policy's vocabulary of {rows}, and references[{number}] "
                f"has {len(reference.backbone.head_weight)}; take kl.kind k1, k2 or k3"
            )


def build_policy(policy: Policy | nn.Module | str | Path, config: ModelConfig) -> Policy:
    """The policy on its device: loaded where a name is given, given a value head where a plain model is."""
    policy = _placed_policy(policy, config)
    policy.backbone.keep_bytes = config.head_memory * 2**20
    if config.gradient_checkpointing:
        recompute_activations(policy.backbone.trunk)
    if config.compile:
        policy.backbone.compile_trunk()
    return policy


def _placed_policy(policy: Policy | nn.Module | str | Path, config: ModelConfig) -> Policy:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(policy, nn.Module):
        if config.load_in_4bit:
            raise InputError("model.load_in_4bit is for a model that is loaded by name; this one is in memory already")
        policy = policy if isinstance(policy, Policy) else Policy(policy)
        if config.lora is not None:
            add_lora(policy.backbone.model, config.lora)
        return policy if config.device == "auto" else policy.to(device)
    # 4-bit weights are made where they are to stay.
    placed: dict[str, Any] = {"device_map": {"": device}} if config.load_in_4bit else {}
    dtype = getattr(torch, config.dtype)
    return Policy.from_pretrained(
        policy, dtype=dtype, lora=config.lora, load_in_4bit=config.load_in_4bit, **placed
    ).to(device)  # fmt: skip


def build_references(
    given: ReferenceLike | Sequence[ReferenceLike] | None, configs: Sequence[ReferenceConfig], policy: Policy
) -> list[Reference]:
    """The references given (a name is loaded, a policy copied), or those that the config names."""
    if given is not None:
        return [_reference(one) for one in (given if isinstance(given, (list, tuple)) else [given])]
    references = []
    for config in configs:
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        options: dict[str, Any] = {
            "weight": config.weight,
            "dtype": dtype,
            "device": config.device or policy.device,
        }
        if config.model is None:
            references.append(Reference.from_policy(policy, **options))
        else:
            references.append(Reference.from_pretrained(config.model, load_in_4bit=config.load_in_4bit, **options))
    return references


def _reference(given: Any) -> Reference:
    if isinstance(given, Reference):
        return given
    if isinstance(given, Policy):
        return Reference.from_policy(given)
    if isinstance(given, (str, Path)):
        return Reference.from_pretrained(str(given))
    raise InputError(f"a reference must be a Reference, a Policy or a model's name, got {type(given).__name__}")
