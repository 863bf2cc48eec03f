"""The language of a second data set, beside what the policy learns."""

from hybrid.data import Loader
from hybrid.objectives.objective import register_objective
from hybrid.objectives.sft import SFT

__all__ = ["PTX"]


@register_objective("ptx")
class PTX(SFT):
    """`sft` on the rows of `ptx_data`; in logs it is called so too, unless a step has both.

    Source: Ouyang et al. 2022, eq. 2 (arXiv:2203.02155), the pretraining term of PPO-ptx.
    """

    label = "sft"

    def rows(self) -> Loader:
        return self.parts.ptx_loader
