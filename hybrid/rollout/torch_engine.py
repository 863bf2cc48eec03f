"""The project's own sampler as an engine: the policy itself, with all that makes it fast."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hybrid.core.rows import moved
from hybrid.distributed import ALONE, World
from hybrid.functional import autocast_dtype
from hybrid.models import Backbone, Policy, Shadow
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.responses import Responses
from hybrid.rollout.sample import sample
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Graphs, Speaker, uniforms

__all__ = ["TorchEngine"]


class TorchEngine(Engine):
    """Owns the shadow of the policy's matrices and the captured steps, both made at first use."""

    def __init__(self, policy: Policy, config: RolloutConfig | None = None, world: World = ALONE):
        super().__init__(policy, config, world)
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
        through: Callable[[Backbone], Speaker] | None = None,
    ) -> Responses:
        """What goes on with `begun` responses is of another shape each time: no steps are kept for it."""
        self.policy.eval()
        backbone, rows = self.backbone(), self.world.share(len(prompt_ids))
        speaker = backbone if through is None else through(backbone)

        def answered(uniform: Tensor | None = None) -> Responses:
            return sample(
                speaker, prompt_ids[rows], prompt_mask[rows], sampling, eos_ids=eos_ids, pad_id=pad_id,
                repeats=repeats, generator=generator, uniform=uniform, is_over=is_over,
                graphs=self._fixed_steps() if begun is None else None,
                begun=None if begun is None else begun.of(rows), limit=limit,
            )  # fmt: skip

        if self.world.size == 1:
            return answered()
        # Every process draws the numbers of all rows: whose rows they are changes no response.
        uniform = uniforms(sampling, len(prompt_ids) * repeats, backbone.device, generator)
        own = uniform[:, rows.start * repeats : rows.stop * repeats]
        parts = self.world.each(lambda: answered(own) if own.shape[1] else None)
        return moved(Responses.widest([part for part in parts if part is not None], pad_id=pad_id), backbone.device)

    def update(self, state: Mapping[str, Tensor]) -> None:
        """They become the policy's, for it draws itself."""
        self.policy.backbone.model.load_state_dict(state)

    def close(self) -> None:
        self._shadow = self._graphs = None

    def backbone(self) -> Backbone:
        """What tokens are drawn from, too: the policy's, or its shadow with the weights as they are now."""
        backbone = self.policy.backbone
        dtype = autocast_dtype(backbone.device)
        if not self.config.shadow or dtype is None or not self.world.whole:
            return backbone
        if self._shadow is None or not self._shadow.is_of(backbone, dtype):
            self._shadow = Shadow(backbone, dtype)
        else:
            self._shadow.refresh()
        self._shadow.backbone.eval()
        return self._shadow.backbone

    def _fixed_steps(self) -> Graphs | None:
        """Steps of fixed shape, where they gain: captured on a GPU, compiled anywhere."""
        captures = self.config.cuda_graphs and self.policy.device.type == "cuda" and self.world.whole
        compiles = self.policy.backbone.is_compiled
        if self._graphs is None and (captures or compiles):
            self._graphs = Graphs(captures=captures, compiles=compiles)
        return self._graphs
