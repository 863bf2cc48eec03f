"""On paper: the memory of a GPU and the seconds of a step, of 8 and 64 GPUs, for each engine.

    python benchmarks/scale.py                # the tables of docs/scale.md

Nothing here was measured on a GPU. What the engines hold and send is: `tests/test_scale.py` compares `held` and `sent`
with the tensors and collectives of two processes, in benchmarks/results/distributed-cpu-1-threads.json.
"""

from dataclasses import dataclass

__all__ = ["GPUS", "MODELS", "SETTINGS", "Machine", "Setting", "Shape", "Work", "held", "memory", "sent", "step"]

GB = 1e9
FLOAT32 = 4
# The share of a GPU's memory that CUDA's context, NCCL and the allocator's holes leave; one we chose.
USABLE = 0.9
# DeepSpeed's `reduce_bucket_size`, numbers: what gradients are gathered up in.
BUCKET = 5e8
# Its `stage3_max_live_parameters`, numbers: gathered weights that it keeps from the forward to the backward pass.
LIVE = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: attention with grouped keys, a gated inner layer."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def kv(self) -> int:
        """Numbers in the keys of a token and layer, and in the values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Its weights: queries and output, keys and values, the inner layer, two norms."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def weights(self) -> int:
        """All of them, the final norm and the value head too."""
        ends = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.layer + ends + self.hidden + (self.hidden + 1)

    @property
    def activation(self) -> int:
        """Numbers that a token leaves in a layer for the backward pass, its attention computed in blocks.

        6 hidden: the layer's input, both norms' outputs, queries, what is attended, the second residual; keys and
        values; 4 inner: gate, its activation, up, their product.
        """
        return 6 * self.hidden + 2 * self.kv + 4 * self.inner


@dataclass(frozen=True)
class Machine:
    """A GPU and its links. Vendors' figures: dense bfloat16 FLOP/s, bytes/s of its memory, NVLink one way, InfiniBand.

    share: of the FLOP/s and the bandwidths that are taken to be reached; one we chose.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float = 989e12
    nvlink: float = 450e9
    network: float = 50e9  # 400 Gbit/s for each GPU
    on_one_node: int = 8
    share: float = 0.4

    def link(self, gpus: int) -> float:
        return self.nvlink if gpus <= self.on_one_node else self.network


@dataclass(frozen=True)
class Work:
    """Of each GPU: rows of prompt and response, supervised or a minibatch of PPO's; and a rollout of `answers` rows."""

    rows: int = 8
    microbatch: int = 8
    prompt: int = 512
    response: int = 512
    answers: int = 32

    @property
    def tokens(self) -> int:
        return self.rows * (self.prompt + self.response)


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    engine: ddp, fsdp2, deepspeed-2 or deepspeed-3.
    width: bytes of a weight, of its gradient and of each of its two states.
    trained: the share of the weights that are, with LoRA.
    reference: whether there is one of its own, in bfloat16 on the GPU; with LoRA it is the policy's own model.
    """

    engine: str
    width: int = FLOAT32
    trained: float = 1.0
    reference: bool = False
    checkpointing: bool = True


def held(weights: float, engine: str, gpus: int, *, width: int = FLOAT32, trained: float = 1.0) -> dict[str, float]:
    """Bytes of a process between its backward pass and its step, for Adam.

        ddp          w P              g P              2 s P
        fsdp2        w P / N          g P / N          2 s P / N
        deepspeed-2  w P + 4 P / N    4 P / N          8 P / N       the second summand of the weights: those it steps
        deepspeed-3  (w + 4) P / N    4 P / N          8 P / N

    N: processes, P: weights, of which the last two columns, and ZeRO's summands, count those that are trained.
    """
    learnt = trained * weights
    if engine in ("ddp", "local"):
        return {"weights": width * weights, "gradients": width * learnt, "states": 2 * width * learnt}
    parts = {"gradients": width * learnt / gpus, "states": 2 * width * learnt / gpus}
    if engine == "fsdp2":
        return {"weights": width * weights / gpus, **parts}
    whole = width * weights / (gpus if engine == "deepspeed-3" else 1)
    return {
        "weights": whole + FLOAT32 * learnt / gpus,
        "gradients": FLOAT32 * learnt / gpus,
        "states": 2 * FLOAT32 * learnt / gpus,
    }


def sent(
    shape: Shape, engine: str, *, microbatches: int = 1, width: int = FLOAT32, trained: float = 1.0
) -> dict[str, float]:
    """Bytes of an update's collectives, whole: `gathered` is what each process has behind its all-gathers, `reduced`
    what goes into the sums of gradients.

        ddp                       reduced P
        fsdp2                     reduced P      gathered (2 layers + ends) for each microbatch
        deepspeed-2               reduced P      gathered P, the stepped weights
        deepspeed-3               reduced P      gathered 2 P for each microbatch

    A layer is gathered for the forward and again for the backward pass; under FSDP2 what is no layer (the ends) once.
    ZeRO-3 was seen to gather 1 P, for a model below LIVE, and 2.8 P where SFT and PPO took turns.
    ZeRO adds up gradients behind every microbatch, DDP and FSDP2 behind the last one.
    """
    learnt, layers = trained * shape.weights * width, shape.layers * shape.layer * width
    whole = shape.weights * width
    reduced = learnt * (microbatches if engine.startswith("deepspeed") else 1)
    gathered = {
        "ddp": 0.0,
        "fsdp2": microbatches * (layers + whole),
        "deepspeed-2": learnt,
        "deepspeed-3": microbatches * 2.0 * whole,
    }[engine]
    return {"gathered": gathered, "reduced": reduced}


def memory(shape: Shape, setting: Setting, gpus: int, work: Work) -> dict[str, float]:
    """Bytes of a GPU, by what; `load`, `update` and `rollout`: the peaks.

    Each process loads the whole model before its engine cuts it.
    """
    engine, width = setting.engine, setting.width
    parts = held(shape.weights, engine, gpus, width=width, trained=setting.trained)
    rows = work.microbatch * (work.prompt + work.response)
    # bfloat16 by autocast; between layers float32 where the weights are.
    kept = shape.layers * shape.hidden * width if setting.checkpointing else shape.layers * shape.activation * 2
    activations = rows * (kept + (shape.activation * 2 if setting.checkpointing else 0))
    reference = 2.0 * shape.weights if setting.reference else 0.0
    # What autocast makes of the weights of a layer, and what is gathered of it; DeepSpeed's and DDP's buckets.
    learnt = setting.trained * shape.weights
    buckets = width * learnt if engine == "ddp" else 0.0
    if engine.startswith("deepspeed"):
        buckets = FLOAT32 * min(BUCKET, learnt)
    ends = shape.weights - shape.layers * shape.layer
    live = {"fsdp2": width * (2 * shape.layer + ends), "deepspeed-3": width * min(shape.weights, LIVE)}.get(engine, 0.0)
    sharded = engine in ("fsdp2", "deepspeed-3")
    cache = work.answers * (work.prompt + work.response) * shape.layers * 2 * shape.kv * 2
    gathered = width * shape.weights if sharded else 0.0
    # Whole weights are sampled from by a bfloat16 shadow of the matrices.
    shadow = 0.0 if sharded or width == 2 else 2.0 * shape.weights
    model = parts["weights"] + parts["states"] + reference
    return {
        **parts, "reference": reference, "activations": activations, "buckets": buckets, "gathered": gathered,
        "cache": cache, "update": model + parts["gradients"] + buckets + live + activations + shadow,
        "load": width * shape.weights + reference,
        "rollout": model + gathered + shadow + cache,
    }  # fmt: skip


def step(shape: Shape, setting: Setting, gpus: int, work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of an update and of a rollout; nothing of a collective hidden behind products.

    products    (2 + 4 (+ 2 with checkpointing)) P tokens / FLOP/s;  frozen weights have no gradient: 2 less of 6
    collectives (N - 1) / N (gathered + 2 reduced) / link, one of the two of `reduced` where it is scattered
    rollout     a gather, then for each token all weights and the mean keys and values, once from the memory
    """
    flops = machine.share * machine.flops
    per_weight = 6 - 2 * (1 - setting.trained) + (2 if setting.checkpointing else 0)
    volume = sent(
        shape, setting.engine, microbatches=-(-work.rows // work.microbatch), width=setting.width,
        trained=setting.trained,
    )  # fmt: skip
    times = 1 if setting.engine == "fsdp2" else 2  # an all-reduce is a reduce-scatter and an all-gather
    link, others = machine.link(gpus), (gpus - 1) / gpus
    gathers = setting.width * shape.weights if setting.engine in ("fsdp2", "deepspeed-3") else 0.0
    read = setting.width if gathers or setting.width == 2 else 2
    mean_cache = work.answers * (work.prompt + work.response / 2) * shape.layers * 2 * shape.kv * 2
    return {
        "products": per_weight * shape.weights * work.tokens / flops,
        "collectives": others * (volume["gathered"] + times * volume["reduced"]) / link,
        "rollout": others * gathers / link
        + work.response * (read * shape.weights + mean_cache) / (machine.share * machine.bandwidth),
    }


MODELS = {
    "1.5B": Shape(28, 1536, 8960, 12, 2, 151936, tied=True),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "70B": Shape(80, 8192, 28672, 64, 8, 128256),
}
GPUS = (Machine("H100", 80 * GB, 3.35e12), Machine("H200", 141 * GB, 4.8e12))
# Of the matrices of a layer, at rank 16 about 0.5 % of the weights.
LORA = 0.005
SETTINGS = {
    "ddp": Setting("ddp", reference=True),
    "ddp, LoRA, bf16": Setting("ddp", width=2, trained=LORA),
    "deepspeed-2": Setting("deepspeed-2", reference=True),
    "deepspeed-3": Setting("deepspeed-3", reference=True),
    "fsdp2": Setting("fsdp2", reference=True),
    "fsdp2, bf16": Setting("fsdp2", width=2, reference=True),
    "fsdp2, LoRA, bf16": Setting("fsdp2", width=2, trained=LORA),
}


def markdown() -> str:
    """A row for each model and setting; what stands before a stroke is of 8 GPUs, behind it of 64."""
    columns = ["model", "setting", "held", "SFT", "PPO", "SFT fits", "PPO fits", "products", "collectives", "rollout"]
    lines = [columns, ["---"] * len(columns)]
    for name, shape in MODELS.items():
        for label, setting in SETTINGS.items():
            both = [_cells(shape, gpus, setting) for gpus in (8, 64)]
            lines.append([name, label, *(f"{x} / {y}" if x != y else x for x, y in zip(*both, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(shape: Shape, gpus: int, setting: Setting) -> list[str]:
    work = Work()
    found, seconds = memory(shape, setting, gpus, work), step(shape, setting, gpus, work, GPUS[0])
    own = found["weights"] + found["gradients"] + found["states"]
    sft = max(found["load"], found["update"]) - found["reference"]
    peaks = sft, max(found[peak] for peak in ("load", "update", "rollout"))
    fits = [", ".join(gpu.name for gpu in GPUS if peak < USABLE * gpu.memory) or "no" for peak in peaks]
    times = [f"{float(f'{seconds[what]:.2g}'):g}" for what in ("products", "collectives", "rollout")]
    return [*(f"{x / GB:.0f}" for x in (own, *peaks)), *fits, *times]


if __name__ == "__main__":
    print(markdown())
