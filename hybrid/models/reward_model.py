"""A policy's reward head and trunk as a folder that plain transformers reads: a sequence classifier of one output."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import InputError, first_line, no_progress_bars
from hybrid.data.tokens import tokens
from hybrid.models.adapt import holds_adapter, is_adapted, merged
from hybrid.models.contract import refusing
from hybrid.models.policy import Policy
from hybrid.models.reward_template import rendered
from hybrid.run.checkpoint import filled_folder

__all__ = ["save_reward_model"]

PAD = "<|pad|>"
STATISTICS = ("reward_mean", "reward_std")
# Rows that the folder is tried on, one shorter than the next.
LENGTHS = (4, 5, 7)


def save_reward_model(
    policy: Policy,
    folder: str | Path,
    *,
    tokenizer: Any,
    chat_template: str,
    statistics: Mapping[str, float] | None = None,
) -> None:
    """Write the trunk and the reward head as a folder of transformers' `AutoModelForSequenceClassification`.

    It has one output, its trunk the policy's dtype; an adapter is merged into a copy. The policy stays as it is.
    tokenizer: saved beside it as a copy, with a pad token of its own: these classifiers answer at a row's last token
        that is no pad token, which must not be an EOS. Where it has none, one is added, and a row of zeros to the
        embeddings that have no room for it.
    chat_template: the tokenizer's, there: see `template_of`.
    statistics: reward_mean and reward_std, of scores on held-out data, for config.json.
    Nothing is written there before the written model was read again and gave the policy's scores.
    Raises InputError, by the architecture's name, where transformers has no such class for it or one that reads
    anything else than the policy's last hidden state; without a reward head; for a folder that holds an adapter.
    """
    if policy.reward_head is None:
        raise InputError("this policy has no reward head to save: call policy.add_reward_head(), and train it")
    if holds_adapter(folder):
        raise InputError(f"{str(folder)!r} holds an adapter, which would be read with the model; take another folder")
    model = policy.backbone.model
    plain = merged(model) if is_adapted(model) else model
    tokenizer = _with_pad_token(tokenizer)
    tokenizer.chat_template = chat_template
    config = copy.deepcopy(plain.config)
    config.num_labels, config.problem_type = 1, "regression"
    for name, value in _checked(statistics or {}).items():
        setattr(config, name, value)
    weight = policy.reward_head.linear.weight.detach() * policy.backbone.logit_scale
    classifier = _classifier(plain, config, weight, tokenizer.pad_token_id)
    with no_progress_bars(), filled_folder(folder, stale=("model*.safetensors*",)) as temporary:
        classifier.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _check_tokens(tokenizer, temporary)
        _check_scores(policy, temporary, tokenizer.pad_token_id)


def _with_pad_token(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose pad token stands for nothing else, and pads where positions do not shift."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    names = ("bos", "eos", "unk", "sep", "cls", "mask")
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in others:
        taken, pad = tokenizer.get_vocab(), PAD
        while pad in taken:
            pad = f"<{pad}>"
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def _checked(statistics: Mapping[str, float]) -> dict[str, float]:
    values = {name: float(value) for name, value in statistics.items()}
    if values and set(values) != set(STATISTICS):
        raise InputError(f"statistics must be {' and '.join(STATISTICS)}, got {', '.join(values)}")
    if not all(map(math.isfinite, values.values())) or values.get("reward_std", 1.0) <= 0:
        raise InputError(f"statistics must be finite numbers, and reward_std above 0, got {values}")
    return values


def _classifier(plain: Any, config: Any, weight: Tensor, pad_id: int) -> Any:
    """The sequence classifier with the weights of a causal LM's trunk, not copied, and of a head, (1, D).

    Only to be saved: what is in no state dict has no memory.
    """
    from transformers import AutoModelForSequenceClassification

    name = type(plain).__name__
    rows = plain.get_input_embeddings().weight.shape[0]
    text = config.get_text_config()
    text.vocab_size = rows
    config.pad_token_id = text.pad_token_id = None
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{name} cannot be saved as a reward model: transformers has no sequence classifier of its kind "
            f"({first_line(error)})"
        ) from error
    score = _score_layer(classifier, weight.shape[1])
    try:
        classifier.base_model.load_state_dict(plain.base_model.state_dict(), assign=True)
    except RuntimeError as error:
        raise InputError(
            f"{name} cannot be saved as a reward model: {type(classifier).__name__} has another trunk "
            f"({first_line(error)})"
        ) from error
    embeddings = classifier.get_input_embeddings()
    kept = embeddings.weight.data
    if pad_id >= rows:
        # A new tensor: the policy's stays as it is.
        embeddings.weight = nn.Parameter(torch.cat([kept, kept.new_zeros(pad_id + 1 - rows, kept.shape[1])]))
        text.vocab_size = pad_id + 1
    config.pad_token_id = text.pad_token_id = pad_id
    classifier.config = config
    score.weight = nn.Parameter(weight.to(kept))
    if score.bias is not None:
        score.bias = nn.Parameter(torch.zeros_like(weight[0, :1]).to(kept))
    if unset := [key for key, value in classifier.state_dict().items() if value.is_meta]:
        raise InputError(
            f"{name} cannot be saved as a reward model: {type(classifier).__name__} reads the trunk by more than one "
            f"linear map ({unset[0]})"
        )
    return classifier


def _score_layer(classifier: Any, size: int) -> nn.Linear:
    trunk = set(classifier.base_model.modules())
    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m not in trunk]
    of_one = [layer for layer in layers if (layer.in_features, layer.out_features) == (size, 1)]
    if not of_one:
        raise InputError(
            f"{type(classifier).__name__} cannot be a reward model: it has no linear map from {size} numbers to one"
        )
    return of_one[-1]


def _check_tokens(tokenizer: Any, folder: Path) -> None:
    """Raise InputError unless the tokenizer in the folder, whose class goes by the model's, reads texts as it does."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    words = tokenizer.decode(range(min(100, len(tokenizer))), skip_special_tokens=True)
    texts = [rendered(of, words, " a time\n") for of in (tokenizer, loaded)]
    ids = [tokens(of, text) for of, text in zip((tokenizer, loaded), texts, strict=True)]
    if texts[0] != texts[1] or ids[0] != ids[1]:
        raise InputError(
            f"the reward model's {type(tokenizer).__name__} was read again as {type(loaded).__name__}, which has other "
            f"tokens for {texts[0][:60]!r}; save it with the tokenizer that belongs to models of its kind"
        )


def _check_scores(policy: Policy, folder: Path, pad_id: int) -> None:
    """Raise InputError unless the model in the folder gives rows padded by `pad_id` the policy's scores."""
    from transformers import AutoModelForSequenceClassification

    vocabulary = [i for i in range(policy.backbone.head_weight.shape[0]) if i != pad_id]
    ids = torch.tensor([vocabulary[i % len(vocabulary)] for i in range(len(LENGTHS) * max(LENGTHS))]).view(
        len(LENGTHS), -1
    )
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    with refusing(policy):
        ours = policy.scores(ids.to(policy.device), mask.to(policy.device)).cpu()
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
    with refusing(loaded):
        theirs = loaded(input_ids=ids.masked_fill(~mask, pad_id), attention_mask=mask.long()).logits[:, 0].float()
    # 16 roundings of the dtype; of float32's, which are small, a thousand, as another device sums in another order.
    tolerance = max(16 * torch.finfo(policy.backbone.head_weight.dtype).eps, 1e-4)
    if not (ours - theirs).norm() <= tolerance * ours.norm():
        raise InputError(
            f"{type(loaded).__name__} gives other scores, {theirs.tolist()}, than the policy's reward head, "
            f"{ours.tolist()}: it reads another hidden state, so that {type(policy.backbone.model).__name__} cannot "
            "be saved as a reward model"
        )
