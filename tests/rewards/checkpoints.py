"""Tiny checkpoints, saved where a test says: the formats of the real ones, without their weights."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

# Truncation shows from 64 tokens on.
MAX_TOKENS = 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCE = "the a is was not he she man woman word good bad happy sad true false cat dog doctor law"
WORDS = SENTENCE.split()
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *"日本語。.,!?'"]
VOCABULARY = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]

# What reaches a reward from the wild.
NASTY = [
    "the cat is good",
    "",
    "   ",
    "🙂🙃 emoji 🏳️‍🌈",
    "e\u0301 combining a\u030a",
    "日本語のテキスト。",
    "\u202bשלום עולם\u202c مرحبا",  # noqa: RUF001 - right to left
    "nul \x00 inside\x00",
    "\x00",
    "word " * 20_000,
    "a" * 100_000,
]
SHORT = [text for text in NASTY if len(text) < 100]

Labels = list[str]
SENTIMENT = ["NEGATIVE", "POSITIVE"]
NLI = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


def tokenizer() -> Any:
    """BERT's own, of words and letters; like many on the hub it does not say how long a text may be."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)})


def bert(
    folder: Path,
    labels: Labels,
    *,
    seed: int = 0,
    logits: list[float] | None = None,
    kind: str = "Bert",
    chat_template: str | None = None,
    **settings: Any,
) -> str:
    """A classifier of BERT's type, or of RoBERTa's, of seeded random weights. Returns its folder.

    logits: what it is to answer to every text.
    """
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **_sizes(labels),
        intermediate_size=32,
        # RoBERTa's first position is pad_id + 1, which takes one of them; BERT's is 0.
        max_position_embeddings=MAX_TOKENS + (1 if kind == "Roberta" else 0),
        pad_token_id=0,
        **settings,
    )
    return _saved(folder, f"{kind}ForSequenceClassification", config, seed, logits, tokenizer(), chat_template)


def decoder(
    folder: Path, labels: Labels, *, seed: int = 0, kind: str = "Llama", chat_template: str | None = None
) -> str:
    """A classifier that reads left to right, without a pad token, and whose tokenizer adds no special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", "<|user|>", "<|assistant|>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    of_words = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    sizes = _sizes(labels) | {"max_position_embeddings": MAX_TOKENS}
    if kind == "Llama":
        sizes |= {"intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=1)
    return _saved(folder, f"{kind}ForSequenceClassification", config, seed, None, of_words, chat_template)


def detoxify(file: Path, *, classes: Labels, seed: int = 0, extra: Any = None) -> str:
    """A checkpoint in detoxify's format: weights, and the config that says how to build the model."""
    import transformers

    folder = bert(file.parent / f"{file.stem}-base", classes, seed=seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    arch = {
        "model_type": folder,
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": len(classes),
    }
    config = {"arch": {"type": "BERT", "args": arch}, "dataset": {"args": {"classes": classes}}}
    torch.save({"config": config, "state_dict": model.state_dict(), "epoch": 1, "extra": extra}, file)
    return str(file)


def plain_logits(folder: str, *texts: str) -> torch.Tensor:
    """What transformers itself says to one text, or one pair, asked alone: (labels,) float32."""
    tokens, model = _plain(folder)
    with torch.no_grad():
        return model(**tokens(*texts, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")).logits[0]


@cache
def _plain(folder: str) -> tuple[Any, Any]:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return transformers.AutoTokenizer.from_pretrained(folder), model


def _sizes(labels: Labels) -> dict[str, Any]:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        # Wide enough that texts get different answers.
        "initializer_range": 0.5,
    }


def _saved(
    folder: Path, cls: str, config: Any, seed: int, logits: list[float] | None, tokens: Any, template: str | None
) -> str:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, cls)(config)
    if logits is not None:
        model.classifier.weight.data.zero_()
        model.classifier.bias.data = torch.tensor(logits)
    model.save_pretrained(folder)
    if template is not None:
        tokens.chat_template = template
    tokens.save_pretrained(folder)
    return str(folder)
