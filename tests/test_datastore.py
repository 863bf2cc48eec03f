"""A datastore of a model and its data, from the command line to evaluation and answers; and what is refused."""

import json
import math
import re

import pytest
import torch

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.data import DataConfig, encode_all, read_examples
from hybrid.datastore import build_datastore
from hybrid.memory import Datastore, DatastoreInfo, filled_datastore
from hybrid.mixing import make_strategy

STORIES = [f"Once upon a time there was a {a} {b}. It was {c}.\n" for a, b, c in [
    ("little", "girl", "happy"), ("big", "dog", "sad"), ("red", "ball", "round"), ("old", "man", "kind"),
    ("small", "cat", "shy"), ("blue", "bird", "free"),
]]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text("".join(STORIES), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory, texts, stories):
    """The command's datastore of the stories."""
    folder = tmp_path_factory.mktemp("store") / "made"
    assert main(["datastore", stories, texts, str(folder), "--dtype", "float32"]) == 0
    return str(folder)


def knn(folder, **settings):
    return {"type": "knn", "datastore": folder, "k": 4, **settings}


def config_of(**sections):
    return HybridConfig.from_dict({"data": {"template": "none"}, **sections})


def encoded(texts, tokenizer):
    config = DataConfig(train=texts)
    return encode_all(read_examples(texts, config), tokenizer, config)


def test_a_stores_keys_are_the_hidden_states_before_every_trained_token(store, texts, stories):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, found = AutoModelForCausalLM.from_pretrained(stories), Datastore(store)
    at = 0
    for example in encoded(texts, AutoTokenizer.from_pretrained(stories)):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0]
        for place in range(1, ids.shape[1]):
            if example.labels[place] >= 0:
                assert int(found.values[at]) == example.input_ids[place]
                torch.testing.assert_close(found.keys[at], hidden[place - 1], atol=1e-4, rtol=1e-4)
                at += 1
    assert at == len(found) > 100


def test_the_command_says_what_it_wrote(texts, stories, tmp_path, capsys):
    assert main(["datastore", stories, texts, str(tmp_path / "new"), "data.limit=2"]) == 0
    said = capsys.readouterr().out
    count = len(Datastore(tmp_path / "new"))
    assert re.search(rf"new: {count} tokens, 64 numbers each, 0\.0 MiB", said)


def test_the_batch_size_changes_nothing_but_rounding(texts, stories, tmp_path):
    config = config_of(model={"name": stories}, data={"train": texts})
    one, all_ = (
        build_datastore(config, tmp_path / str(size), dtype="float32", batch_size=size) for size in (1, len(STORIES))
    )
    assert torch.equal(one.values, all_.values)
    torch.testing.assert_close(one.keys, all_.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--capacity", "20"], r"tokens to remember, and a datastore takes 1 to 20; lower data.limit, or raise"),
        (["data.trian=3"], "did you mean 'data.train'"),
        (["data.filter=nowhere:f"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(texts, stories, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("hybrid.datastore.build_policy", None)
    assert main(["datastore", stories, texts, str(tmp_path / "new"), *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_data_without_targets_make_no_store(stories, tmp_path, capsys):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "Once"}) + "\n")
    assert main(["datastore", stories, str(rows), str(tmp_path / "new")]) == 2
    assert "give examples with targets" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_a_model_is_loaded(texts, stories, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hybrid.datastore.build_policy", None)
    (tmp_path / "thesis.tex").write_text("")
    assert main(["datastore", stories, texts, str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err


# Answers and measures


def test_text_that_the_store_holds_is_hardly_a_surprise(store, texts, stories):
    def losses(**settings):
        decoder = knn(store, temperature=0.1, **settings)
        return HybridTrainer(
            stories, config=config_of(data={"eval": texts, "template": "none"}, eval={"decoder": decoder})
        ).evaluate()

    half = losses(k=1, lam=0.5)
    assert half["decoder/perplexity"] == pytest.approx(math.exp(half["decoder/sft_loss"]))
    # The nearest key of each state is its own: p >= 1/2 everywhere but at contexts that go on in two ways.
    assert half["decoder/sft_loss"] < math.log(2) + 0.1 < half["sft_loss"]
    nothing = losses(lam=0.0)
    assert nothing["decoder/sft_loss"] == pytest.approx(nothing["sft_loss"], abs=1e-6)
    assert nothing["sft_loss"] == half["sft_loss"]


def test_an_evaluation_by_samples_has_no_second_loss(texts, stories):
    metrics = HybridTrainer(stories, config=config_of(data={"eval": texts})).evaluate()
    assert not any(name.startswith("decoder/") for name in metrics)


def test_the_command_line_generates_and_evaluates_with_a_store(store, texts, stories, tmp_path, capsys):
    said = f"sampling.decoder={{type: knn, datastore: {store}, k: 1, lam: 1.0}}"
    assert (
        main(["generate", stories, "Once upon a time there was a big", "--set", said, "--set", "data.template=none"])
        == 0
    )
    assert "→ dog. It was sad." in capsys.readouterr().out
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": {"name": stories}, "data": {"eval": texts}}))
    assert main(["eval", str(config), said.replace("sampling", "eval")]) == 0
    assert re.search(r"decoder/perplexity +\d", capsys.readouterr().out)


class Other:
    def get_vocab(self):
        return {"a": 0}


def store_of_another(folder, tokenizer):
    info = DatastoreInfo.of("another/one", torch.nn.Linear(2, 2), tokenizer, hidden_size=64)
    with filled_datastore(folder, info) as add:
        add(torch.eye(5, 64), torch.zeros(5))
    return str(folder)


@pytest.mark.parametrize("section", ["sampling", "eval"])
def test_another_tokenizers_store_is_refused_before_the_model_is_loaded(stories, tmp_path, monkeypatch, section):
    monkeypatch.setattr("hybrid.learner.build_models", None)
    config = config_of(**{section: {"decoder": knn(store_of_another(tmp_path / "other", Other()))}})
    with pytest.raises(InputError, match=r"of another tokenizer: .*'another/one'"):
        HybridTrainer(stories, config=config)


@pytest.mark.parametrize("section", ["sampling", "eval"])
def test_another_models_store_is_refused_before_anything_is_answered(stories, tmp_path, section):
    own = HybridTrainer(stories).tokenizer
    config = config_of(**{section: {"decoder": knn(store_of_another(tmp_path / "other", own))}})
    with pytest.raises(InputError, match=r"of another model: .*'another/one' as it was then"):
        HybridTrainer(stories, config=config)


def test_a_policy_that_was_trained_on_is_another_one(store, stories):
    rows = [{"prompt": "Once", "target": " upon"}]
    hybrid = HybridTrainer(stories, None, rows, config=config_of(sampling={"decoder": knn(store)}))
    hybrid.generate(["Once"])
    hybrid.sft_step(rows)
    with pytest.raises(InputError, match=r"of another model"):
        hybrid.generate(["Once"])


@pytest.mark.parametrize("section", ["sampling", "eval"])
def test_a_run_that_would_train_the_policy_is_refused(store, section):
    config = config_of(reward={"type": "sentiment_lexicon"}, **{section: {"decoder": knn(store)}})
    with pytest.raises(InputError, match=rf"config: {section}\.decoder 'knn' goes with the weights.*hybrid eval"):
        config.check_training(make_strategy(config.mixing))


def test_ppo_refuses_its_responses_by_name(store, stories):
    rows = [{"prompt": "Once", "target": " upon"}]
    hybrid = HybridTrainer(
        stories, None, rows, {"type": "sentiment_lexicon"}, config_of(sampling={"decoder": knn(store)})
    )
    with pytest.raises(InputError, match="objective 'ppo' cannot learn from the responses of decoder 'knn'"):
        hybrid.rollout(rows)
