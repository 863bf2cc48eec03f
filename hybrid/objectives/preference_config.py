"""What the steps on preferences have in common."""

from dataclasses import dataclass

__all__ = ["PreferencesConfig"]


@dataclass(frozen=True)
class PreferencesConfig:
    """Steps on preferences: objectives `dpo`, `kto` and `reward_model`."""

    batch_size: int = 16  # pairs of one optimizer step; of kto, answers
    # Log-probs under the reference of the answers in the data: computed once, and kept in the run's folder. False:
    # at every step anew.
    cache_reference: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"PreferencesConfig.batch_size must be >= 1, got {self.batch_size}")
