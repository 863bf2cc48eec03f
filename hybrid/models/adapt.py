"""LoRA adapters and 4-bit weights: what is put into a Hugging Face model, taken out of it, and switched off."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import InputError, first_line, unknown_name
from hybrid.models.contract import refusing

__all__ = [
    "LoraConfig",
    "add_lora",
    "adopted",
    "check_base",
    "four_bit_options",
    "holds_adapter",
    "is_adapted",
    "load_adapter",
    "merged",
    "require",
    "save_adapter",
    "under_adapter",
    "without_adapter",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What may differ from peft's defaults: all that leaves y = W x + scale * B A x, with W as it was.
FREE = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "task_type", "inference_mode", "auto_mapping",
        "peft_version", "base_model_name_or_path", "revision", "runtime_config"}  # fmt: skip

STATE_SPACE = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


def require(module: str, what: str, install: str) -> None:
    """Raises InputError with what to install where there is no package `module`. Imports nothing."""
    if find_spec(module) is None:
        raise InputError(f"{what} needs {module}, which is not installed: pip install 'hybrid-trainer[{install}]'")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen weights: y = W x + (alpha / rank) B A x, with B = 0 at first; A and B train.

    Source: Hu et al. 2021 (arXiv:2106.09685).
    """

    rank: int = 16
    alpha: int = 32  # the update counts alpha / rank
    dropout: float = 0.0  # of the adapters' inputs, in SFT steps
    target_modules: tuple[str, ...] | None = None  # names of linear layers, as q_proj; None: all but the LM head

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank must be >= 1, got {self.rank}")
        if self.alpha < 1:
            raise ValueError(f"LoraConfig.alpha must be >= 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout must lie in [0, 1), got {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("LoraConfig.target_modules must name a layer, or be left out for all linear layers")
        require("peft", "model.lora", "peft")


def four_bit_options(dtype: torch.dtype) -> dict[str, Any]:
    """How `AutoModelForCausalLM.from_pretrained` loads linear layers in 4 bits (nf4, its constants quantized too).

    dtype: of the computation. Source: Dettmers et al. 2023 (arXiv:2305.14314).
    """
    require("bitsandbytes", "model.load_in_4bit", "bnb")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def add_lora(model: Any, config: LoraConfig) -> None:
    """Freeze a transformers model and put new adapters into its linear layers, in place.

    A model that has an adapter already keeps that one. Raises InputError where it is not of the config's rank
    and alpha, for a target that names no linear layer, and where the model does not run with it.
    """
    import peft

    if is_adapted(model):
        (there,) = model.peft_config.values()
        if (there.r, there.lora_alpha) != (config.rank, config.alpha):
            raise InputError(
                f"the model has an adapter of rank {there.r} and alpha {there.lora_alpha}, and model.lora asks for "
                f"{config.rank} and {config.alpha}; give model.lora the adapter's, or merge it first (hybrid export)"
            )
        return
    if any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules()):
        raise InputError(
            f"model.lora: the cells of {type(model).__name__} are no linear layers, so adapters would leave frozen "
            "what it computes with; train all of it"
        )
    for target in config.target_modules or ():
        if target not in (linear := _linear_layers(model)):
            raise unknown_name("layer in model.lora.target_modules:", target, linear)
    # By name: of peft's "all-linear" the fused weights of experts are a part, which are no linear layers.
    targets = config.target_modules or sorted(_linear_layers(model) - _kept_plain(model))
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft sets it right by itself for GPT-2's Conv1D, and says so for each layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        try:
            model.add_adapter(lora)
        except ValueError as error:  # layers that peft does not adapt in models of this type
            raise InputError(f"model.lora on {type(model).__name__}: {first_line(error)}") from error
    adopted(model)
    try:
        with refusing(model):
            model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except InputError as error:  # peft took a layer that is linear by its class alone (a router)
        raise InputError(f"{error}; that is with model.lora, whose layers model.lora.target_modules names") from error


def adopted(model: Any) -> Any:
    """The transformers model inside a peft one (any other as it is), its adapter float32 and ready to train.

    float32 also over bfloat16 weights, in which PPO's small updates would round away.
    Raises InputError where there is more to it than one LoRA adapter on linear layers.
    """
    for layer in model.modules():
        # bitsandbytes would repack the weights at the first forward without gradient, and lose bits (its constants
        # become bfloat16): rollouts would then be of another model than the one that trains.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return model
    import peft

    if isinstance(model, peft.PeftModel):
        model = model.get_base_model()
        # As transformers' own add_adapter leaves it.
        model._hf_peft_config_loaded = True
    [(name, config), *others] = configs.items()
    kind = type(config).__name__ if type(config) is not peft.LoraConfig else ""
    plain = vars(peft.LoraConfig())
    # peft leaves an empty set where a model with experts has none that are adapted.
    changed = {k: v for k, v in vars(config).items() if k not in FREE and (v or None) != (plain.get(k) or None)}
    odd = [kind] if kind else [f"{k}={v!r}" for k, v in changed.items()]
    if odd or others:
        raise InputError(f"the model's adapter must be one plain LoRA adapter, got {', '.join(odd or configs)}")
    for which in (model.get_input_embeddings(), model.get_output_embeddings()):
        if _is_adapter(which):
            raise InputError("the model's adapter must leave embeddings and LM head alone, and adapt linear layers")
    model.set_adapter(name)
    for module in filter(_is_adapter, model.modules()):
        module.lora_A.float()
        module.lora_B.float()
    return model


def is_adapted(model: Any) -> bool:
    """Whether a transformers model has an adapter in it."""
    return getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """Inside the block `module` is the model under its adapter, without dropout; afterwards it is as it was."""
    layers: list[Any] = [m for m in module.modules() if _is_adapter(m)]
    was_training = module.training
    frozen = [p for p in module.parameters() if not p.requires_grad]
    module.eval()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # Switching an adapter on makes it trainable, which it may not have been.
        for parameter in frozen:
            parameter.requires_grad_(False)
        module.train(was_training)


@torch.no_grad()
def merged(model: Any) -> Any:
    """A plain copy of an adapted model on the CPU, with the adapter added into its weights.

        W' = W + (alpha / rank) B A, in float32, rounded to W's dtype

    4-bit weights come back in the dtype they were computed in. The model itself is not touched: peft's own merging
    and unmerging changes it by rounding.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    state = {}
    for name in plain.state_dict():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        weight = getattr(layer.get_base_layer() if _is_adapter(layer) else layer, leaf)
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        if _is_adapter(layer) and leaf == "weight":
            if not weight.is_floating_point():
                raise InputError(f"cannot merge an adapter into {weight.dtype} weights, only into 4-bit or plain ones")
            (adapter,) = layer.active_adapters
            weight = (weight + layer.get_delta_weight(adapter)).to(weight.dtype)
        state[name] = weight.detach().cpu()
    plain.load_state_dict(state, assign=True)
    # From a GPU each name of a tied weight came as a copy of its own.
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as peft does, bit for bit: `AutoModelForCausalLM` reads the folder, over the model it names."""
    from safetensors.torch import save_file

    check_base(model)
    (config,) = model.peft_config.values()
    config.save_pretrained(folder)
    state = {name: x.detach().cpu().contiguous() for name, x in _adapter_weights(model).items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def check_base(model: Any) -> None:
    """Refuse (InputError) a model whose adapter cannot be saved alone: the model below it is nowhere to be read from.

    That is one that was made in memory, or whose embeddings were resized after it was loaded.
    """
    from transformers import AutoConfig

    (config,) = model.peft_config.values()
    name, rows = config.base_model_name_or_path, model.get_input_embeddings().weight.shape[0]
    way_out = "save the model in a folder, and load it from there"
    if not name:
        raise InputError(f"the adapter of a model that was made in memory cannot be saved alone: {way_out}")
    try:
        there = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise InputError(f"the model {name!r} below the adapter is not there any more: {way_out}") from error
    if rows != there:
        raise InputError(
            f"the model's embeddings have {rows} rows, and {name!r}, from which its adapter will be read again, has "
            f"{there}: {way_out}"
        )


@torch.no_grad()
def load_adapter(model: Any, folder: Path) -> None:
    """Take the adapter's weights from a folder. Raises InputError where they are not of this model's adapter."""
    from safetensors.torch import load_file

    own, saved = _adapter_weights(model), load_file(folder / ADAPTER_WEIGHTS)
    if {k: x.shape for k, x in own.items()} != {k: x.shape for k, x in saved.items()}:
        raise InputError(f"the adapter in {str(folder)!r} has other layers or another rank than this model's")
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def holds_adapter(name_or_path: str | Path) -> bool:
    """Whether a folder is an adapter's, as peft and `save_adapter` write it."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def under_adapter(name_or_path: str | Path) -> str | None:
    """The model that the adapter in a folder was made for; None where the folder holds no adapter."""
    if not holds_adapter(name_or_path):
        return None
    path = Path(name_or_path) / ADAPTER_CONFIG
    require("peft", f"the adapter in {str(name_or_path)!r}", "peft")
    try:
        base = json.loads(path.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = None
    if not base:
        raise InputError(f"{str(path)!r} does not say which model the adapter is for (base_model_name_or_path)")
    return base


def _linear_layers(model: Any) -> set[str]:
    """The last parts of the names of the trunk's linear layers: q_proj, k_proj, ..."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return {name.rpartition(".")[2] for name in linear}


def _kept_plain(model: Any) -> set[str]:
    """Layers that peft adapts in no state-space model: their kernels read the weight itself."""
    return {"out_proj"} if model.config.model_type in STATE_SPACE else set()


def _is_adapter(module: nn.Module) -> bool:
    """Told by what it can do: peft, which has the class, need not be there."""
    return hasattr(module, "get_base_layer") and hasattr(module, "enable_adapters")


def _adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapter's parameters under the names that peft's files have."""
    (adapter,) = model.peft_config
    return {
        "base_model.model." + name.replace(f".{adapter}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
