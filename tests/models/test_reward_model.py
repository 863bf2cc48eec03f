"""A saved reward model: plain transformers gives the policy's scores, and the policy stays as it was."""

import copy
import json

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hybrid.core import Example, InputError
from hybrid.data import DataConfig, encode
from hybrid.models import LoraConfig, Policy, add_lora, save_reward_model, template_of
from hybrid.models.reward_template import rendered

# Seven roundings of float32, a sum's: the batch is padded and the attention's sums are made in another order.
ROUNDING = 1e-5
PAIRS = [("the good happy", "it was w1 w2"), ("a", "no"), ("is it w3 w4 w5", "yes it is w6 w7 w8 fine"), ("", "dull")]
DATA = DataConfig(template="{prompt} ### ")
KINDS = ("gpt2", "llama", "qwen2", "gpt_neox", "opt", "gemma", "gptj", "gemma2", "phi")
ABSOLUTE = ("gpt2", "gptj")


def scored_policy(family="llama", *, lora=False, **overrides):
    policy = Policy(tiny_model(family, **overrides)).eval()
    if lora:
        add_lora(policy.backbone.model, LoraConfig(rank=4))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    policy.add_reward_head()
    return policy


def rows_of(tokenizer, config=DATA, pairs=PAIRS):
    return [encode(Example(*pair), tokenizer, config).input_ids for pair in pairs]


def scores_of(policy, rows):
    with torch.no_grad():
        return torch.cat([policy.scores(torch.tensor([row]), torch.ones(1, len(row))) for row in rows])


def plain_scores(folder, texts, **options):
    """As a user of transformers asks it, who knows nothing of us."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def saved(policy, folder, tokenizer, config=DATA, **options):
    save_reward_model(policy, folder, tokenizer=tokenizer, chat_template=template_of(config, tokenizer), **options)
    return [rendered(AutoTokenizer.from_pretrained(folder), *pair) for pair in PAIRS]


def of_bytes():
    """A tokenizer of the class that transformers takes for every model of Qwen 2's type."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {byte: i for i, byte in enumerate(["</s>", *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="</s>", pad_token="</s>", unk_token="</s>")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_gives_the_policys_scores_in_a_padded_batch(tokenizer, tmp_path, family, side):
    if side == "left" and family in ABSOLUTE:
        pytest.skip("transformers counts a padded row's absolute positions from the padding on")
    tokenizer = of_bytes() if family == "qwen2" else tokenizer
    policy = scored_policy(family, **{"vocab_size": 257} if family == "qwen2" else {})
    texts = saved(policy, tmp_path / "out", tokenizer)
    ours = scores_of(policy, rows_of(tokenizer))
    torch.testing.assert_close(
        plain_scores(tmp_path / "out", texts, padding_side=side), ours, atol=ROUNDING, rtol=ROUNDING
    )
    backwards = plain_scores(tmp_path / "out", texts[::-1], padding_side=side)
    torch.testing.assert_close(backwards.flip(0), ours, atol=ROUNDING, rtol=ROUNDING)
    # The control: without its EOS a text is another one.
    cut = plain_scores(tmp_path / "out", [text.removesuffix("</s>") for text in texts], padding_side=side)
    assert (cut - ours).abs().min() > 100 * ROUNDING


def test_an_adapter_is_merged(needs_peft, tokenizer, tmp_path):
    policy = scored_policy(lora=True)
    texts = saved(policy, tmp_path / "out", tokenizer)
    ours = scores_of(policy, rows_of(tokenizer))
    torch.testing.assert_close(plain_scores(tmp_path / "out", texts), ours, atol=ROUNDING, rtol=ROUNDING)
    bare = scored_policy()
    bare.reward_head = policy.reward_head
    assert (scores_of(bare, rows_of(tokenizer)) - ours).abs().min() > 100 * ROUNDING


def test_a_factor_of_the_logits_is_in_the_saved_weight(tokenizer, tmp_path):
    # The models that scale their logits (Cohere's, Granite's) have no classifier; one may come.
    policy = scored_policy()
    policy.backbone.logit_scale = 0.5
    texts = saved(policy, tmp_path / "out", tokenizer)
    ours = scores_of(policy, rows_of(tokenizer))
    torch.testing.assert_close(plain_scores(tmp_path / "out", texts), ours, atol=ROUNDING, rtol=ROUNDING)


def test_a_bfloat16_trunk_is_saved_in_bfloat16(tokenizer, tmp_path):
    policy = Policy(tiny_model().bfloat16()).eval()
    policy.add_reward_head()
    texts = saved(policy, tmp_path / "out", tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    # 8 bits, of the trunk's sums and of the head's weight.
    theirs, ours = plain_scores(tmp_path / "out", texts).float(), scores_of(policy, rows_of(tokenizer))
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_saving_leaves_the_policy_and_the_tokenizer_as_they_were(needs_peft, tokenizer, tmp_path, lora):
    policy = scored_policy(lora=lora)
    policy.train()
    before, size, config = copy.deepcopy(policy.state_dict()), len(tokenizer), policy.backbone.model.config.to_dict()
    saved(policy, tmp_path / "out", tokenizer)
    assert policy.training and all(torch.equal(before[name], x) for name, x in policy.state_dict().items())
    assert policy.backbone.model.config.to_dict() == config
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.chat_template) == (size, "</s>", None)


def test_a_pad_token_that_is_eos_is_replaced_and_gets_a_row(tokenizer, tmp_path):
    saved(scored_policy(), tmp_path / "out", tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert other.pad_token_id == model.config.pad_token_id == 97 != other.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 98


def test_embeddings_with_room_get_no_row(tokenizer, tmp_path):
    saved(scored_policy(vocab_size=128), tmp_path / "out", tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.pad_token_id, model.get_input_embeddings().weight.shape[0]) == (97, 128)


def test_a_pad_token_of_its_own_stays(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "w60"})
    saved(scored_policy(), tmp_path / "out", own)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == own.convert_tokens_to_ids("w60")
    assert model.get_input_embeddings().weight.shape[0] == 97


@pytest.mark.parametrize("kind", ["unk", None])
def test_a_pad_token_that_texts_hold_is_replaced(tokenizer, tmp_path, kind):
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.unk_token if kind else None
    saved(scored_policy(), tmp_path / "out", own)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 97


def test_a_tokenizer_that_pads_on_the_left_pads_on_the_right_there(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "own")
    own = AutoTokenizer.from_pretrained(tmp_path / "own", padding_side="left")
    policy = scored_policy("gpt2")
    texts = saved(policy, tmp_path / "out", own)
    ours = scores_of(policy, rows_of(tokenizer))
    torch.testing.assert_close(plain_scores(tmp_path / "out", texts), ours, atol=ROUNDING, rtol=ROUNDING)
    assert own.padding_side == "left"


def test_a_tokenizer_that_is_read_again_as_another_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="read again as Qwen2Tokenizer, which has other tokens"):
        saved(scored_policy("qwen2"), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_statistics_stand_in_the_config(tokenizer, tmp_path):
    saved(scored_policy(), tmp_path / "out", tokenizer, statistics={"reward_mean": 0.5, "reward_std": 2})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (0.5, 2.0)


@pytest.mark.parametrize("wrong", [{"reward_mean": 1.0}, {"reward_mean": 0.0, "reward_std": 0.0}, {"mean": 1.0}])
def test_wrong_statistics_are_refused(tokenizer, tmp_path, wrong):
    with pytest.raises(InputError, match="statistics must be"):
        saved(scored_policy(), tmp_path / "out", tokenizer, statistics=wrong)


def test_an_architecture_without_a_classifier_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"CohereForCausalLM cannot be saved .* no sequence classifier"):
        saved(scored_policy("cohere"), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_reads_another_hidden_state_is_refused_and_nothing_is_written(
    tokenizer, tmp_path, monkeypatch
):
    from transformers import LlamaForSequenceClassification

    forward = LlamaForSequenceClassification.forward

    def shifted(self, input_ids, **kwargs):
        return forward(self, input_ids=input_ids.flip(1), **kwargs)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", shifted)
    with pytest.raises(InputError, match="reads another hidden state, so that LlamaForCausalLM"):
        saved(scored_policy(), tmp_path / "out", tokenizer)
    assert not any(tmp_path.iterdir())


def test_a_policy_without_reward_head_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no reward head to save"):
        saved(Policy(tiny_model()), tmp_path / "out", tokenizer)


def test_a_folder_with_an_adapter_is_refused(needs_peft, tokenizer, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        saved(scored_policy(), tmp_path, tokenizer)
