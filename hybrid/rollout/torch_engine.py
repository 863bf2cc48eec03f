"""The project's own sampler as an engine: the policy itself, with all that makes it fast."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hybrid.functional import autocast_dtype
from hybrid.models import Backbone, Policy, Shadow
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.responses import Responses
from hybrid.rollout.sample import sample
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Graphs

__all__ = ["TorchEngine"]


class TorchEngine(Engine):
    """Owns the shadow of the policy's matrices and the captured steps, both made at first use."""

    def __init__(self, policy: Policy, config: RolloutConfig | None = None):
        super().__init__(policy, config)
        self._shadow: Shadow | None = None
        self._graphs: Graphs | None = None

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingConfig,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        repeats: int = 1,
        generator: torch.Generator | None = None,
        is_over: Callable[[Sequence[int]], bool] | None = None,
        begun: Responses | None = None,
        limit: int | None = None,
    ) -> Responses:
        """What goes on with `begun` responses is of another shape each time: no steps are kept for it."""
        self.policy.eval()
        return sample(
            self.backbone(), prompt_ids, prompt_mask, sampling, eos_ids=eos_ids, pad_id=pad_id, repeats=repeats,
            generator=generator, is_over=is_over, graphs=self._fixed_steps() if begun is None else None,
            begun=begun, limit=limit,
        )  # fmt: skip

    def update(self, state: Mapping[str, Tensor]) -> None:
        """They become the policy's, for it draws itself."""
        self.policy.backbone.model.load_state_dict(state)

    def close(self) -> None:
        self._shadow = self._graphs = None

    def backbone(self) -> Backbone:
        """What tokens are drawn from, too: the policy's, or its shadow with the weights as they are now."""
        backbone = self.policy.backbone
        dtype = autocast_dtype(backbone.device)
        if not self.config.shadow or dtype is None:
            return backbone
        if self._shadow is None or not self._shadow.is_of(backbone, dtype):
            self._shadow = Shadow(backbone, dtype)
        else:
            self._shadow.refresh()
        self._shadow.backbone.eval()
        return self._shadow.backbone

    def _fixed_steps(self) -> Graphs | None:
        """Steps of fixed shape, where they gain: captured on a GPU, compiled anywhere."""
        captures = self.config.cuda_graphs and self.policy.device.type == "cuda"
        compiles = self.policy.backbone.is_compiled
        if self._graphs is None and (captures or compiles):
            self._graphs = Graphs(captures=captures, compiles=compiles)
        return self._graphs
