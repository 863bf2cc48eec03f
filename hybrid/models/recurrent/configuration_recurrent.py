"""What a recurrent language model is made of. A saved model carries this file, which needs transformers alone."""

from typing import Any

from transformers import PreTrainedConfig

__all__ = ["CELLS", "RecurrentConfig"]

CELLS = ("lstm", "gru")


class RecurrentConfig(PreTrainedConfig):
    """Sizes and kind of a recurrent language model.

    cell: "lstm" or "gru".   hidden_size: of embeddings, cells and hidden states, D.
    num_hidden_layers: cells on top of each other.
    dropout: of what goes into each layer and out of the last, never of what goes from a token to the next
        (Zaremba et al. 2014, arXiv:1409.2329).
    memory_slots, memory_width: the external memory beside the last cell, slots of so many numbers; 0 slots: none.
    Raises ValueError for a size that is none, and for a cell that is not known.
    """

    model_type = "hybrid_recurrent"

    def __init__(
        self,
        vocab_size: int = 1000,
        hidden_size: int = 256,
        num_hidden_layers: int = 1,
        cell: str = "lstm",
        dropout: float = 0.0,
        memory_slots: int = 0,
        memory_width: int = 16,
        initializer_range: float = 0.1,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers,
                 "memory_width": memory_width}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"RecurrentConfig.{name} must be >= 1, got {size}")
        if cell not in CELLS:
            raise ValueError(f"RecurrentConfig.cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"RecurrentConfig.dropout must lie in [0, 1), got {dropout}")
        if not initializer_range > 0:
            raise ValueError(f"RecurrentConfig.initializer_range must be > 0, got {initializer_range}")
        # A shift by one to either side meets itself where there are fewer.
        if memory_slots < 0 or 0 < memory_slots < 3:
            raise ValueError(f"RecurrentConfig.memory_slots must be 0 (no memory) or >= 3, got {memory_slots}")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.cell, self.dropout = cell, dropout
        self.memory_slots, self.memory_width = memory_slots, memory_width
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(**kwargs)
        # After it: transformers before 5.4 has a default of its own.
        self.tie_word_embeddings = tie_word_embeddings
