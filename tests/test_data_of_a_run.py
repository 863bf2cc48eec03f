"""A run on data as people have it: from the file or object to steps that were taken."""

import datasets
import pandas
import pytest
import torch
from tiny import tiny_model

from hybrid import HybridTrainer
from hybrid.config import HybridConfig
from hybrid.core import InputError

ROWS = [{"instruction": "the", "input": f"w{i}", "output": "good fine", "id": i} for i in range(6)]
PAIRS = [{"prompt": f"w{i}", "target": "good"} for i in range(6)]
CONFIG = {
    "sampling": {"max_new_tokens": 4},
    "sft": {"batch_size": 2},
    "ppo": {"batch_size": 2, "minibatch_size": 2, "epochs": 1},
    "mixing": {"strategy": "sequential", "sft_steps": 1, "ppo_steps": 1},
    "eval": {"num_prompts": 2},
}


def num_letters(response):
    return float(len(response))


def make(tokenizer, train_data=None, reward=num_letters, **settings):
    model = tiny_model(vocab_size=97, bos_token_id=None, pad_token_id=2)
    given = {name: settings.pop(name) for name in ("eval_data", "ptx_data") if name in settings}
    return HybridTrainer(model, tokenizer, train_data, reward, HybridConfig.from_dict(CONFIG | settings), **given)


def test_alpaca_rows_of_a_parquet_file_are_trained_and_said(tokenizer, tmp_path, capsys):
    path = tmp_path / "alpaca.parquet"
    pandas.DataFrame(ROWS).to_parquet(path)
    trainer = make(tokenizer, str(path))
    before = [p.clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert trainer.num_steps == 2
    assert not all(map(torch.equal, before, trainer.policy.parameters()))
    assert (
        f"data: 6 training examples of {path}: prompt = 'instruction' + 'input', target = 'output'; "
        "unused columns: id\n" in capsys.readouterr().out
    )
    assert {e.prompt for e in trainer.corpus.train} == {f"the\n\nw{i}" for i in range(6)}


def test_a_dict_of_splits_brings_its_held_out_data(tokenizer, capsys):
    splits = {name: datasets.Dataset.from_list(PAIRS[:n]) for name, n in (("train", 6), ("test", 1), ("validation", 2))}
    trainer = make(tokenizer, datasets.DatasetDict(splits))
    assert (len(trainer.corpus.train), len(trainer.corpus.eval)) == (6, 2)
    assert "sft_loss" in trainer.train()
    assert capsys.readouterr().out.splitlines()[:2] == [
        "data: 6 training examples of split 'train': prompt = 'prompt', target = 'target'; unused splits: 'test'",
        "data: 2 evaluation examples of split 'validation': prompt = 'prompt', target = 'target'",
    ]


def test_a_saved_dict_of_splits_may_be_named_in_a_config(tokenizer, tmp_path):
    both = {name: datasets.Dataset.from_list(PAIRS[:n]) for name, n in (("train", 6), ("test", 1))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "d")
    trainer = make(tokenizer, data={"train": str(tmp_path / "d")})
    assert (len(trainer.corpus.train), len(trainer.corpus.eval)) == (6, 1)
    assert trainer.corpus.lines[1].endswith("target = 'target'; no split is called validation")
    trainer = make(tokenizer, data={"train": f"{tmp_path}/d:test", "eval": f"{tmp_path}/d:train"})
    assert (len(trainer.corpus.train), len(trainer.corpus.eval)) == (1, 6)


SPLITS = {"train": PAIRS, "validation": PAIRS[:2]}


@pytest.mark.parametrize(
    ("settings", "num_train", "num_eval"),
    [({"eval_data": PAIRS[:1]}, 6, 1), ({"data": {"eval_fraction": 0.5}}, 3, 3), ({"ptx_data": SPLITS}, 6, 2)],
)
def test_a_held_out_split_gives_way_to_what_is_asked_for(tokenizer, settings, num_train, num_eval):
    corpus = make(tokenizer, SPLITS, **settings).corpus
    assert (len(corpus.train), len(corpus.eval)) == (num_train, num_eval)


def test_splits_without_one_called_train_are_refused_by_name(tokenizer):
    with pytest.raises(InputError, match=r"no split 'train', and has 'train_sft', 'test_sft'"):
        make(tokenizer, {"train_sft": PAIRS, "test_sft": PAIRS})
    with pytest.raises(InputError, match="splits 'train', 'validation'; choose one"):
        make(tokenizer, PAIRS, eval_data=SPLITS)


def test_tokenised_rows_are_trained(tokenizer):
    rows = [{"input_ids": [7, 8, 9, 2], "labels": [-100, 8, 9, 2]}] * 4
    trainer = make(tokenizer, rows)
    trainer.train()
    assert trainer.corpus.train[0].prompt_ids == (7,)


def test_an_id_that_the_tokenizer_has_not_is_refused_with_its_row(tokenizer):
    with pytest.raises(InputError, match=r"the id 600, .*The example: \[7, 600\]"):
        make(tokenizer, [{"input_ids": [7, 600]}])


def test_the_examples_that_are_too_long_are_not_counted(tokenizer):
    rows = [*PAIRS, {"prompt": "w1 " * 50, "target": "good"}]
    trainer = make(tokenizer, rows, data={"max_length": 20})
    assert trainer.corpus.lines == ("data: 6 training examples: prompt = 'prompt', target = 'target'",)
