import pytest
import torch
from rewards.checkpoints import NASTY, SENTIMENT, bert, decoder, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward

# float32 sums in another order where rows are padded.
ROUNDING = 1e-5
PROMPT = "is the cat good"
# Ends, as templates do, with the token that a careless caller would pad with.
TEMPLATE = "{% for turn in messages %}<|{{ turn.role }}|> {{ turn.content }} </s> {% endfor %}"
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
