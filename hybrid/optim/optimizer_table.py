"""The optimizers as data: for each name its backend, its class, and which key goes to which argument."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from hybrid.optim.backend import loaded, try_step
from hybrid.optim.keys import Key

__all__ = ["COMMON", "KEYS", "ROWS", "OptimizerRow"]

Arguments = Mapping[str, str | tuple[str, ...]]

# The keys that every optimizer takes: they make the parameter groups.
COMMON = {
    "weight_decay": Key(0.01),
    "decay_all": Key(False, "flag"),
    "value_head_lr": Key(None, limits="> 0"),
}

# Every key of any optimizer here.
KEYS = COMMON | {
    "beta1": Key(0.9, limits="[0, 1)"),
    "beta2": Key(0.999, limits="[0, 1)"),
    "beta3": Key(0.9999, limits="[0, 1)"),
    "alpha_mix": Key(5.0),  # weight of the slow average, arXiv:2409.03137
    "t_alpha": Key(None, "count", "> 0"),  # steps over which alpha_mix grows from 0
    "t_beta3": Key(None, "count", "> 0"),  # steps over which beta3 grows from beta1
    "eps": Key(1e-8),
    "fused": Key(True, "flag"),  # one pass over the weights instead of fourteen, where torch has that for the device
    "initial_accumulator_value": Key(0.0),
    "lr_decay": Key(0.0),
    "alpha": Key(0.99, limits="[0, 1)"),
    "centered": Key(False, "flag"),
    "momentum": Key(0.0, limits="[0, 1)"),
    "dampening": Key(0.0),
    "nesterov": Key(False, "flag"),
    "eps1": Key(1e-30),  # added to the squared gradient: the paper's epsilon_1, no relative of `eps`
    "eps2": Key(1e-3),  # least scale of a parameter: the paper's epsilon_2
    "clip_threshold": Key(1.0, limits="> 0"),
    "decay_rate": Key(-0.8, limits="[-1, 0)"),
    "relative_step": Key(False, "flag"),
    "scale_parameter": Key(False, "flag"),
    "warmup_init": Key(False, "flag"),
}


CUTTING = ("fsdp2", "deepspeed")
# bitsandbytes does not know FSDP2's tensors, ZeRO's are plain ones.
ON_FLAT = ("deepspeed",)


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    path: "module:class".   arguments: the class's argument -> our key, or keys where it takes a tuple.
    constants: arguments that are part of the name.   fixed: keys of its family that the class cannot honour,
    with the only value they may have, and `instead`, the name that can.
    needs: (key, key that must then be on, or above 0); a first key of None: always.
    engines: those that it steps parts of weights for. None, where a weight's step depends on others of its tensor, or
        a state is one of a block.
    """

    name: str
    path: str
    summary: str
    arguments: Arguments
    aliases: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    instead: str = ""
    needs: tuple[tuple[str | None, str], ...] = ()
    engines: tuple[str, ...] = CUTTING

    @property
    def backend(self) -> str:
        """The package that must be installed."""
        module = self.path.partition(".")[0]
        return "transformers" if module == "hybrid" else module

    @property
    def keys(self) -> dict[str, Key]:
        """The keys that this optimizer takes."""
        taken = [key for keys in self.arguments.values() for key in ([keys] if isinstance(keys, str) else keys)]
        return {key: KEYS[key] for key in (*taken, *self.fixed, *COMMON)}

    def __call__(self, groups: list[dict[str, Any]], *, lr: float, **values: Any) -> torch.optim.Optimizer:
        """The optimizer over the groups; `values`: of this row's keys, without the common ones."""
        kwargs = {
            argument: values[key] if isinstance(key, str) else tuple(values[k] for k in key)
            for argument, key in self.arguments.items()
        } | dict(self.constants)
        make = loaded(self.name, self.path)
        if "fused" in kwargs:
            kwargs["fused"] = kwargs["fused"] and all(
                p.device.type in FUSES for group in groups for p in group["params"]
            )
        if self.backend == "bitsandbytes":
            try_step(self.name, make, kwargs, [p for group in groups for p in group["params"]])
        return make(groups, lr=lr, **kwargs)


# Devices for which torch >= 2.7 has Adam in one pass.
FUSES = ("cpu", "cuda")
ADAM: Arguments = {"betas": ("beta1", "beta2"), "eps": "eps"}
FUSED_ADAM: Arguments = {**ADAM, "fused": "fused"}
LION: Arguments = {"betas": ("beta1", "beta2")}
ADEMAMIX: Arguments = {
    "betas": ("beta1", "beta2", "beta3"),
    "alpha": "alpha_mix",
    "t_alpha": "t_alpha",
    "t_beta3": "t_beta3",
    "eps": "eps",
}
ADAGRAD: Arguments = {"initial_accumulator_value": "initial_accumulator_value", "lr_decay": "lr_decay", "eps": "eps"}
RMSPROP: Arguments = {"alpha": "alpha", "eps": "eps", "momentum": "momentum", "centered": "centered"}
SGD: Arguments = {"momentum": "momentum", "dampening": "dampening", "nesterov": "nesterov"}
ADAFACTOR: Arguments = {
    "eps": ("eps1", "eps2"),
    "clip_threshold": "clip_threshold",
    "decay_rate": "decay_rate",
    "relative_step": "relative_step",
    "scale_parameter": "scale_parameter",
    "warmup_init": "warmup_init",
}


TORCH_ROWS = [
    OptimizerRow("adamw", "torch.optim:AdamW", "Adam with decoupled weight decay", FUSED_ADAM),
    OptimizerRow("adam", "torch.optim:Adam", "Adam; its weight decay is added to the gradient", FUSED_ADAM),
    OptimizerRow("adamax", "torch.optim:Adamax", "Adam with the infinity norm", ADAM),
    OptimizerRow("radam", "torch.optim:RAdam", "Adam with a rectified, warm-up-free start", ADAM),
    OptimizerRow(
        "adagrad",
        "torch.optim:Adagrad",
        "rates shrink with the sum of squared gradients",
        ADAGRAD,
        engines=("fsdp2",),  # it has states before its first step, which ZeRO does not find
    ),
    OptimizerRow("rmsprop", "torch.optim:RMSprop", "rates shrink with the recent squared gradients", RMSPROP),
    OptimizerRow(
        "sgd",
        "torch.optim:SGD",
        "plain, momentum or Nesterov gradient descent",
        SGD,
        needs=(("nesterov", "momentum"),),
    ),
    OptimizerRow(
        "adafactor",
        "hybrid.optim.adafactor:adafactor",
        "factored second moments: memory of rows plus columns",
        ADAFACTOR,
        needs=(("warmup_init", "relative_step"),),
        engines=(),
    ),
]


def _adam_family(family: str, arguments: Arguments, said: str) -> list[OptimizerRow]:
    """bitsandbytes' four of a family: 8-bit states (of tensors with 4096 elements and more) or 32-bit, paged or not."""
    rows = []
    for paged, bits in product(("", "Paged"), (8, 32)):
        name = f"{paged}_{family}".lower().lstrip("_")
        # AdEMAMix32bit and its paged twin raise at the first step on the CPU; the plain class is 32-bit too.
        plain = family == "AdEMAMix" and bits == 32
        rows.append(
            OptimizerRow(
                f"{name}_{bits}bit",
                f"bitsandbytes.optim:{paged}{family}{'' if plain else f'{bits}bit'}",
                f"{said}; {bits}-bit states{', moved to the CPU when memory is short' if paged else ''}",
                arguments,
                aliases=(name,) if bits == 32 and family in ("AdEMAMix", "Lion") else (),
                constants={"optim_bits": 32} if plain else {},
                engines=ON_FLAT if bits == 32 else (),
            )
        )
    return rows


def _other_bnb_rows(bits: int) -> list[OptimizerRow]:
    """The rest of bitsandbytes, with what it ignores or refuses."""
    return [
        OptimizerRow(
            f"adagrad_{bits}bit",
            f"bitsandbytes.optim:Adagrad{bits}bit",
            f"Adagrad; {bits}-bit states",
            {"eps": "eps"},
            fixed={"initial_accumulator_value": 0.0, "lr_decay": 0.0},
            instead="adagrad",
            engines=ON_FLAT if bits == 32 else (),
        ),
        OptimizerRow(
            f"rmsprop_{bits}bit",
            f"bitsandbytes.optim:RMSprop{bits}bit",
            f"RMSprop without momentum; {bits}-bit states",
            {"alpha": "alpha", "eps": "eps"},
            fixed={"momentum": 0.0, "centered": False},
            instead="rmsprop",
            engines=ON_FLAT if bits == 32 else (),
        ),
        OptimizerRow(
            f"sgd_{bits}bit",
            f"bitsandbytes.optim:SGD{bits}bit",
            f"momentum gradient descent (needs MOMENTUM > 0); {bits}-bit states",
            {"momentum": "momentum"},
            fixed={"dampening": 0.0, "nesterov": False},
            instead="sgd",
            needs=((None, "momentum"),),
            engines=ON_FLAT if bits == 32 else (),
        ),
    ]


ROWS = [
    *TORCH_ROWS,
    *_adam_family("AdamW", ADAM, "AdamW"),
    *_adam_family("Adam", ADAM, "Adam, its weight decay decoupled as in AdamW"),
    *_adam_family("AdEMAMix", ADEMAMIX, "Adam with a second, slow average"),
    *_adam_family("Lion", LION, "sign of an interpolated momentum; wants a rate 3 to 10 times lower"),
    *_other_bnb_rows(8),
    *_other_bnb_rows(32),
]
