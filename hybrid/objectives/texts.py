"""What the rows of an update say, for whoever has to find out what is wrong with them."""

from typing import Any

from hybrid.core import IGNORE, Batch, Labelled, Pairs, Rollout, Rows

__all__ = ["texts_of"]


def texts_of(rows: Rows, tokenizer: Any) -> list[dict[str, Any]]:
    """A row each for `samples.jsonl`, decoded with its special tokens: what the model was given.

    A supervised row has a target and no response; of packed examples it holds several. Of pairs it is either side.
    """
    if isinstance(rows, (Pairs, Labelled)):
        rows = rows.sides if isinstance(rows, Pairs) else rows.answers
    assert isinstance(rows, (Batch, Rollout))
    found = []
    for i, ids in enumerate(rows.input_ids):
        seen = rows.attention_mask[i].bool()
        if isinstance(rows, Rollout):
            first = rows.prompt_length
            prompt, answer = ids[:first][seen[:first]], ids[first:][rows.mask[i]]
            row = {"response": tokenizer.decode(answer.tolist()), "target": "", "reward": float(rows.score[i])}
        else:
            trained = rows.labels[i] != IGNORE
            prompt = ids[seen & ~trained]
            row = {"response": "", "target": tokenizer.decode(ids[trained].tolist()), "reward": None}
        found.append({"prompt": tokenizer.decode(prompt.tolist()), **row, "components": {}})
    return found
