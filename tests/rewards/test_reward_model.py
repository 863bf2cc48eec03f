import copy

import pytest
import torch
from rewards.checkpoints import NASTY, SENTIMENT, bert, decoder, plain_logits
from tiny import tiny_model

from hybrid import RewardModel
from hybrid.core import Example, InputError
from hybrid.data import DataConfig, encode
from hybrid.models import Policy, save_reward_model, template_of
from hybrid.rewards import make_reward

# float32 sums in another order where rows are padded.
ROUNDING = 1e-5
PROMPT = "is the cat good"
# Ends, as templates do, with the token that a careless caller would pad with.
TEMPLATE = "{% for turn in messages %}<|{{ turn.role }}|> {{ turn.content }} </s> {% endfor %}"
DATA = DataConfig(template="{prompt} ### ")
# The responses start with a space: where data.template is none, nothing else stands between the two.
PAIRS = [("the good happy", " it was w1 w2"), ("a", " no"), ("is it w3 w4", " yes it is w6 w7 w8 fine"), ("", "dull")]
FULL = [text for text in NASTY if text.strip()]


def reward_model(path, **settings):
    return make_reward({"type": "reward_model", "path": path, **settings})


def test_the_score_is_the_raw_logit_of_a_pair_alone(tmp_path):
    folder = bert(tmp_path, ["LABEL_0"])
    expected = [float(plain_logits(folder, PROMPT, text)) for text in FULL]
    reward = reward_model(folder)
    assert reward.score(FULL, prompts=[PROMPT] * len(FULL)) == pytest.approx(expected, abs=ROUNDING)
    assert [reward(text, prompt=PROMPT) for text in FULL] == pytest.approx(expected, abs=ROUNDING)


def test_without_prompt_the_response_is_read_alone(tmp_path):
    folder = bert(tmp_path, ["LABEL_0"])
    scores = reward_model(folder).score(["good", "bad", "sad"], prompts=[None, PROMPT, ""])
    expected = [plain_logits(folder, "good"), plain_logits(folder, PROMPT, "bad"), plain_logits(folder, "sad")]
    assert scores == pytest.approx([float(logit) for logit in expected], abs=ROUNDING)


def test_a_decoder_without_template_reads_prompt_and_response_as_one_text(tmp_path):
    folder = decoder(tmp_path, ["LABEL_0"])
    texts = [text for text in FULL if len(text) < 100]
    expected = [float(plain_logits(folder, f"{PROMPT} {text}")) for text in texts]
    scores = reward_model(folder).score(texts, prompts=[f"{PROMPT} "] * len(texts))
    assert scores == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_chat_template_is_used_where_there_is_one(tmp_path, kind):
    folder = decoder(tmp_path, ["LABEL_0"], kind=kind, chat_template=TEMPLATE)
    texts = ["good cat", "the dog is not sad", "a"]
    expected = [float(plain_logits(folder, f"<|user|> {PROMPT} </s> <|assistant|> {text} </s>")) for text in texts]
    scores = reward_model(folder).score(texts, prompts=[PROMPT] * len(texts))
    assert scores == pytest.approx(expected, abs=ROUNDING)


def test_input_overrides_what_the_tokenizer_suggests(tmp_path):
    folder = bert(tmp_path, ["LABEL_0"], chat_template=TEMPLATE)
    joined = float(plain_logits(folder, f"{PROMPT}good"))
    assert reward_model(folder, input="text")("good", prompt=PROMPT) == pytest.approx(joined, abs=ROUNDING)
    pair = float(plain_logits(folder, PROMPT, "good"))
    assert reward_model(folder, input="pair")("good", prompt=PROMPT) == pytest.approx(pair, abs=ROUNDING)
    assert reward_model(folder)("good", prompt=PROMPT) not in (pytest.approx(pair), pytest.approx(joined))


def test_a_template_brings_its_own_special_tokens(tmp_path):
    folder = bert(tmp_path, ["LABEL_0"], chat_template="[CLS]{{ messages[0].content }}[SEP]")
    expected = float(plain_logits(folder, PROMPT))
    assert reward_model(folder)("good", prompt=PROMPT) == pytest.approx(expected, abs=ROUNDING)


def test_of_several_outputs_the_label_says_which(tmp_path):
    folder = bert(tmp_path, SENTIMENT, logits=[-2.0, 3.0])
    assert reward_model(folder, label="positive")("good") == 3.0
    with pytest.raises(InputError, match=r"label must say which output of .* NEGATIVE, POSITIVE"):
        reward_model(folder).setup()


def test_nasty_texts_on_either_side_have_finite_scores(tmp_path):
    for build in (bert, decoder):
        reward = reward_model(build(tmp_path / build.__name__, ["LABEL_0"]))
        scores = reward.score([*NASTY, *["good"] * len(NASTY)], prompts=[*[PROMPT] * len(NASTY), *NASTY])
        assert torch.tensor(scores).isfinite().all()


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"REWARD.path '/no/such/folder' does not exist"):
        reward_model("/no/such/folder")


def test_the_path_must_be_given():
    with pytest.raises(InputError, match=r"REWARD.path is missing"):
        make_reward({"type": "reward_model"})


def test_chat_without_a_template_is_refused(tmp_path):
    with pytest.raises(InputError, match="input 'chat' needs a tokenizer with a chat template"):
        reward_model(bert(tmp_path, ["LABEL_0"]), input="chat").setup()


def test_a_stories_model_with_a_new_head_scores_a_batch_like_single_texts(stories, tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(stories, num_labels=1)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path)
    reward = reward_model(str(tmp_path))
    texts = ["Once upon a time there was a girl.", "One day", "The end", "", "日本語 🙂"]
    assert reward.score(texts) == pytest.approx([reward(text) for text in texts], abs=ROUNDING)


FORMS = [(bert, "pair", None), (bert, "text", None), (decoder, "text", None), (decoder, "chat", TEMPLATE)]


@pytest.mark.parametrize(("build", "form", "template"), FORMS)
def test_a_prompt_too_long_for_the_model_loses_its_beginning_and_the_response_stays(tmp_path, build, form, template):
    reward = reward_model(build(tmp_path, ["LABEL_0"], chat_template=template), input=form)
    words = ["is", "the", "cat", "good", "or", "bad", "he", "not", "man"] * 40
    long = reward.score(["good cat", "bad dog"], prompts=[" ".join(words) + " "] * 2)
    assert long.parts["reward_model"].counts["truncated"] == 2
    assert long[0] != long[1]
    # What it then reads is one of the prompt's ends.
    ends = [" ".join(words[-n:]) + " " for n in range(1, 64)]
    whole = [reward.score(["good cat", "bad dog"], prompts=[end] * 2) for end in ends]
    last = max(i for i, output in enumerate(whole) if "truncated" not in output.parts["reward_model"].counts)
    assert long == pytest.approx(whole[last], abs=ROUNDING) or build is bert


def test_a_response_too_long_for_the_model_loses_its_end_inside_the_template(tmp_path):
    reward = reward_model(decoder(tmp_path, ["LABEL_0"], chat_template=TEMPLATE))
    output = reward.score(["good " * 100, "good " * 100 + "bad"], prompts=[PROMPT] * 2)
    # 64 tokens, of which the template takes 4 and the prompt 4.
    assert output == pytest.approx([reward(" ".join(["good"] * 56), prompt=PROMPT)] * 2, abs=ROUNDING)
    assert output.parts["reward_model"].counts["truncated"] == 2


# A model that was trained here, and ensembles


def trained(folder, tokenizer, *, seed=0, config=DATA, **options):
    """A reward model of a tiny Llama as it is saved after training, and the policy that it was."""
    policy = Policy(tiny_model("llama", seed=seed)).eval()
    policy.add_reward_head()
    template = template_of(config, tokenizer)
    save_reward_model(policy, folder, tokenizer=tokenizer, chat_template=template, **options)
    return policy, str(folder)


def row_scores(policy, tokenizer, pairs, config=DATA):
    rows = [torch.tensor([encode(Example(*pair), tokenizer, config).input_ids]) for pair in pairs]
    with torch.no_grad():
        return torch.cat([policy.scores(row, torch.ones_like(row)) for row in rows])


@pytest.mark.parametrize("template", ["default", "none", "chat"])
def test_the_policys_scores_of_rows_are_those_of_texts_by_model_and_by_reward(tokenizer, tmp_path, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    own.chat_template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    config = DataConfig(template=template)
    policy, folder = trained(tmp_path / "out", own, config=config)
    expected = row_scores(policy, own, PAIRS, config)
    prompts, responses = zip(*PAIRS, strict=True)
    model = RewardModel.from_pretrained(folder)
    scores = model.score(responses, prompts)
    assert (scores.dtype, scores.shape) == (torch.float32, (4,))
    torch.testing.assert_close(scores, expected, atol=ROUNDING, rtol=ROUNDING)
    backwards = model.score(responses[::-1], prompts[::-1]).flip(0)
    torch.testing.assert_close(backwards, expected, atol=ROUNDING, rtol=ROUNDING)
    reward = reward_model(folder).score(list(responses), prompts=list(prompts))
    assert reward == pytest.approx(expected.tolist(), abs=ROUNDING)
    # The control: read as one text, without template and EOS, they are other texts.
    assert (RewardModel.from_pretrained(folder, form="text").score(responses, prompts) - expected).abs().min() > 0.001


def test_whole_texts_are_read_as_plain_text_was_trained(tokenizer, tmp_path):
    policy, folder = trained(tmp_path / "out", tokenizer)
    texts = ["the good", "a bad w1 w2"]
    expected = row_scores(policy, tokenizer, [("", text) for text in texts])
    torch.testing.assert_close(RewardModel.from_pretrained(folder).score(texts), expected, atol=ROUNDING, rtol=ROUNDING)


def test_whole_texts_are_read_as_they_stand_by_a_model_whose_template_needs_a_prompt(tmp_path):
    folder = bert(tmp_path, ["LABEL_0"], chat_template=TEMPLATE)
    model = RewardModel.from_pretrained(folder)
    assert float(model.score(["good cat"])) == pytest.approx(float(plain_logits(folder, "good cat")), abs=ROUNDING)
    assert float(model.score(["good cat"], [""])) != pytest.approx(float(model.score(["good cat"])), abs=ROUNDING)


def test_a_reward_model_comes_back_with_its_statistics(tokenizer, tmp_path):
    _, folder = trained(tmp_path / "out", tokenizer, statistics={"reward_mean": 1.0, "reward_std": 2.0})
    model = RewardModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = RewardModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again.score(["good"], ["a"]), model.score(["good"], ["a"]))
    assert again.statistics == (1.0, 2.0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama").config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a reward model whose tokenizer cannot be found"):
        RewardModel.from_pretrained(tmp_path)


def test_a_language_model_is_no_reward_model(stories):
    with pytest.raises(InputError, match=r"has no score\.weight"):
        RewardModel.from_pretrained(stories)


def test_texts_and_prompts_must_be_as_many(tokenizer, tmp_path):
    model = RewardModel.from_pretrained(trained(tmp_path / "out", tokenizer)[1])
    assert model.score([]).shape == (0,)
    with pytest.raises(ValueError, match="prompts must be as many as texts: got 1 for 2"):
        model.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="must be lists of texts"):
        model.score("good")


@pytest.fixture
def members(tmp_path):
    """Three models that answer 1, 2 and 6 to everything, with the statistics of two of them."""
    answers = zip((1.0, 2.0, 6.0), STATISTICS, strict=True)
    return [bert(tmp_path / str(x), ["LABEL_0"], logits=[x], **statistics) for x, statistics in answers]


# (1 - 0) / 2 = 0.5 and (2 - 3) / 0.5 = -2.
STATISTICS = ({"reward_mean": 0, "reward_std": 2.0}, {"reward_mean": 3.0, "reward_std": 0.5}, {})


def test_an_ensembles_score_is_by_hand(members):
    # Mean 3; distances -2, -1 and 3: population variance 14 / 3.
    std = (14 / 3) ** 0.5
    assert reward_model(members)("good") == pytest.approx(3.0)
    assert reward_model(members, aggregate="min")("good") == 1.0
    assert reward_model(members, aggregate="mean_minus_std")("good") == pytest.approx(3 - std)
    assert reward_model(members, aggregate="mean_minus_std", std_coef=0.5)("good") == pytest.approx(3 - std / 2)


def test_each_members_scores_are_put_by_its_own_statistics(members):
    assert reward_model(members[:2], normalized=True)("good") == pytest.approx(-0.75)
    assert reward_model(members[:2], normalized=True, aggregate="min")("good") == -2.0
    assert reward_model(members[0], normalized=True)("good") == 0.5


def test_a_model_without_statistics_is_refused_before_the_first_score(members):
    with pytest.raises(InputError, match=r"does not say how its scores are distributed: .* reward_mean None"):
        reward_model(members, normalized=True).setup()


def test_members_disagreement_is_logged_and_starts_anew_with_each_batch(members):
    reward = reward_model(members)
    for _ in range(2):
        metrics = reward.score(["good", "bad"]).metrics()
        assert metrics["reward/reward_model/member_std"] == pytest.approx((14 / 3) ** 0.5)
    assert "reward/reward_model/member_std" not in reward_model(members[0]).score(["good"]).metrics()


def test_each_member_reads_with_its_own_tokenizer_and_template(tokenizer, tmp_path):
    two = [("one", DATA), ("two", DataConfig(template="none"))]
    made = [trained(tmp_path / name, tokenizer, seed=i, config=c) for i, (name, c) in enumerate(two)]
    alone = [row_scores(policy, tokenizer, PAIRS, c) for (policy, _), (_, c) in zip(made, two, strict=True)]
    prompts, responses = (list(x) for x in zip(*PAIRS, strict=True))
    scores = reward_model([folder for _, folder in made]).score(responses, prompts=prompts)
    assert scores == pytest.approx(((alone[0] + alone[1]) / 2).tolist(), abs=ROUNDING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": []}, "path must name a model, or several"),
        ({"path": ["a", "/no/such/folder"]}, r"REWARD.path\[1\] '/no/such/folder' does not exist"),
        ({"aggregate": "median"}, "aggregate must be"),
        ({"std_coef": -1.0, "aggregate": "mean_minus_std"}, "std_coef must be at least 0"),
        ({"std_coef": 2.0}, "std_coef is for aggregate 'mean_minus_std'"),
    ],
)
def test_a_wrong_ensemble_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward({"type": "reward_model", "path": "a", **settings})
