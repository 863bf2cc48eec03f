"""What the data is, where it lies and how it becomes prompts and targets."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["DataConfig", "Format"]

Format = Literal["auto", "json", "jsonl", "csv", "text", "parquet", "arrow", "hf"]


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Columns that are not named are found by the layouts of `hybrid.data.columns`; docs/data.md shows them.
    """

    train: str | list[str] | None = None  # files, patterns, folders, or Hugging Face datasets: "name" or "name:split"
    eval: str | list[str] | None = None  # the same, held out
    eval_fraction: float = 0.0  # share of the training rows to hold out where there is no eval
    format: Format = "auto"  # auto: by the file's suffix; without one, a Hugging Face dataset
    prompt: str | None = None  # column of texts or messages; without a target column, they serve rollouts only
    target: str | None = None  # column of the answers wanted
    text: str | None = None  # column of plain text: all of it is trained, its beginning is the prompt
    messages: str | None = None  # column of dialogues, also ShareGPT's: the assistant's turns are trained
    chosen: str | None = None  # preferences: column of the better answers, texts or messages; the prompt is `prompt`,
    rejected: str | None = None  # or the beginning that both sides share; column of the worse answers
    label: str | None = None  # column of true (a good answer) and false, beside the answers
    template: str = "default"  # default, none, chat (the tokenizer's), or your own text with {prompt} in it
    system: str | None = None  # system message that the chat template starts with
    prompt_tokens: int = 8  # plain text: its leading tokens that a rollout starts from
    max_length: int = 512  # tokens; longer examples are left out and counted, never cut
    filter: str | None = None  # package.module:function, row -> bool: which rows to keep
    shuffle: bool = True  # the rows, once, when they are read
    limit: int | None = None  # rows to keep, after filter and shuffle

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"DataConfig.format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"DataConfig.eval_fraction must lie in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction and self.eval is not None:
            raise ValueError("DataConfig.eval_fraction must be 0 where DataConfig.eval is given")
        given = [name for name in ("prompt", "text", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"DataConfig.{given[0]} and DataConfig.{given[1]} exclude each other")
        pairs = [name for name in ("chosen", "rejected") if getattr(self, name) is not None]
        single = [name for name in ("target", "text", "messages", "label") if getattr(self, name) is not None]
        if pairs and single:
            raise ValueError(f"DataConfig.{pairs[0]} and DataConfig.{single[0]} exclude each other")
        if self.target is not None and self.prompt is None:
            raise ValueError(f"DataConfig.target = {self.target!r} needs DataConfig.prompt beside it")
        if self.template not in ("default", "none", "chat") and "{prompt}" not in self.template:
            raise ValueError(
                f"DataConfig.template must be default, none or chat, or hold {{prompt}}, got {self.template!r}"
            )
        if self.system is not None and self.template != "chat":
            raise ValueError(f"DataConfig.system needs DataConfig.template = 'chat', got {self.template!r}")
        if self.prompt_tokens < 0:
            raise ValueError(f"DataConfig.prompt_tokens must be >= 0, got {self.prompt_tokens}")
        for name in ("max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DataConfig.{name} must be >= 1, got {value}")
