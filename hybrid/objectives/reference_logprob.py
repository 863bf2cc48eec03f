"""Log-probs of answers under the reference: of a fixed data set computed once, and kept."""

import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hybrid.core import Batch, Encoded, InputError
from hybrid.data import collate
from hybrid.models import Policy, Reference
from hybrid.objectives.objective import Parts
from hybrid.run import disk_errors, write_file

__all__ = ["ReferenceLogprob", "answer_logprob", "numbered_reference"]

FOLDER = "reference_logprob"
BATCH_SIZE = 32
NOT_THE_MODELS = ("_name_or_path", "transformers_version")  # of its config: where it lay, and who wrote it


def numbered_reference(parts: Parts, number: int) -> Reference:
    """The reference of that number. Raises InputError where there is none."""
    found = parts.references
    if not 0 <= number < len(found):
        raise InputError(f"reference must be the number of one of the {len(found)} references, got {number}")
    return found[number]


@torch.no_grad()
def answer_logprob(
    parts: Parts, model: Policy | Reference, batch: Batch, groups: Sequence[Tensor], *, temperature: float = 1.0
) -> Tensor:
    """The sum over each row's trained tokens of their log-probs under the model, (rows of the batch,) float32.

    groups: the rows of each forward. Without dropout: a reference may be the policy's own model with its adapter off.
    """
    parts.policy.eval()
    sums = torch.zeros(len(batch), device=batch.labels.device)
    with parts.world.gathered(), parts.autocast():
        for rows in groups:
            logprob, _ = model.batch_logprob(batch[rows].trimmed(), temperature=temperature)
            sums[rows.to(sums.device)] = logprob.sum(1).to(sums.dtype)
    return sums


class ReferenceLogprob:
    """Sums over the tokens of answers of their log-probs under one of the references. Owns those that it keeps.

    What is kept is known by the reference's weights, the data's tokens and the precision: changed ones are computed
    anew, in the run's folder as in memory.
    """

    def __init__(self, parts: Parts, number: int = 0):
        self.parts, self.number = parts, number
        self._kept: dict[int, float] = {}
        self._owners: list[Sequence[Encoded]] = []  # whose ids are the keys: they must not be another's one day

    @property
    def reference(self) -> Reference:
        """Raises InputError where there is none of that number."""
        return numbered_reference(self.parts, self.number)

    def of(self, batch: Batch, groups: Sequence[Tensor] | None = None, *, temperature: float = 1.0) -> Tensor:
        """(rows of the batch,) float32.   groups: the rows of each forward; None: all in one."""
        groups = [torch.arange(len(batch))] if groups is None else groups
        return answer_logprob(self.parts, self.reference, batch, groups, temperature=temperature)

    def kept(self, examples: Sequence[Encoded]) -> Tensor | None:
        """(examples,) float32 of those that are all kept; else None."""
        keys = [id(e) for e in examples]
        if not keys or any(key not in self._kept for key in keys):
            return None
        return torch.tensor([self._kept[key] for key in keys])

    def keep(self, examples: Sequence[Encoded]) -> None:
        """Compute those of these examples, or read them from the run's folder."""
        if not examples or all(id(e) in self._kept for e in examples):
            return
        with self.parts.world.gathered():
            values = self.parts.world.once(lambda: self._found(examples))
        self._kept |= zip(map(id, examples), values.tolist(), strict=True)
        self._owners.append(examples)

    def _found(self, examples: Sequence[Encoded]) -> Tensor:
        """Read, or computed and written."""
        file = None
        if self.parts.folder is not None:
            file = self.parts.folder / FOLDER / f"{self._digest(examples)}.safetensors"
        values = _read(file, len(examples)) if file is not None and file.is_file() else None
        if values is None:
            values = self._computed(examples)
            if file is not None:
                with disk_errors(f"write to {str(file)!r}"):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_file(file, save({"logprob": values}))
        return values

    def _computed(self, examples: Sequence[Encoded]) -> Tensor:
        began, values = time.perf_counter(), torch.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = collate([examples[i] for i in chosen], pad_id=0).to(self.parts.policy.device)
            values[chosen] = self.of(batch).cpu()
        seconds = time.perf_counter() - began
        print(f"reference: log-probs of {len(examples):,} answers in {seconds:.0f} s, computed once", flush=True)
        return values

    @cached_property
    def _model_digest(self) -> "hashlib._Hash":
        """Of the reference's settings and weights, which are frozen."""
        model = self.reference.backbone.model
        settings = {name: x for name, x in model.config.to_dict().items() if name not in NOT_THE_MODELS}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, x in model.state_dict().items():
            if ".lora_" not in name:
                digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
                digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest

    def _digest(self, examples: Sequence[Encoded]) -> str:
        """Of all that the log-probs depend on."""
        digest = self._model_digest.copy()
        device = self.parts.policy.device.type
        with self.parts.autocast():
            computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        digest.update(f"{device} {computed_in} {BATCH_SIZE}".encode())
        for e in examples:
            for ids in (e.input_ids, e.labels):
                digest.update(array("q", (len(ids), *ids)).tobytes())
        return digest.hexdigest()[:32]


def _read(file: Path, count: int) -> Tensor | None:
    """What a file keeps; None where it is not whole."""
    try:
        with safe_open(file, framework="pt") as stored:
            values: Tensor = stored.get_tensor("logprob")
    except Exception as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}; remove it, and it is computed anew") from error
    return values if values.shape == (count,) else None
