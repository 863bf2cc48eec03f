import math

import pytest
import torch
from rewards.checkpoints import NASTY, decoder

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves import language_model

STORY = "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park."
SHUFFLED = "park Lily a toys. in girl to there named upon was her little time, with loved the a Once She play"
SHORT = [text for text in NASTY if text.strip() and len(text) < 100]
UNIFORM = math.log(512)  # the loss of a uniform guess among the vocabulary of stories260K
# float32 sums in another order, of losses up to 25.
ROUNDING = {"rel": 1e-4}


@pytest.fixture(scope="module")
def plain(stories):
    """The mean loss of a text's tokens in float64, as an independent loop computes it one window at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64).eval()

    def loss(text, max_length=512, stride=512, before=None):
        ids, start = tokenizer(text).input_ids, 0
        if before is not None:
            prefix = tokenizer(before).input_ids
            ids, start = prefix + tokenizer(text, add_special_tokens=False).input_ids, len(prefix)
        losses = {}
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + max_length]
            with torch.no_grad():
                logprob = model(torch.tensor([window])).logits[0].log_softmax(-1)
            for t in range(1, len(window)):
                if begin + t >= start:
                    losses.setdefault(begin + t, -logprob[t - 1, window[t]].item())
            if begin + max_length >= len(ids):
                break
        return sum(losses.values()) / len(losses)

    return loss


def perplexity(stories, **settings):
    return make_reward({"type": "perplexity", "model": stories, "device": "cpu", **settings})


def test_perplexity_is_that_of_a_loop_in_float64(stories, plain):
    texts = [STORY, SHUFFLED, *SHORT]
    expected = [math.exp(plain(text)) for text in texts]
    assert perplexity(stories, reward_mode="raw").score(texts) == pytest.approx(expected, **ROUNDING)


@pytest.mark.parametrize(("max_length", "stride"), [(32, 16), (32, 31), (32, 32), (32, 1), (7, 3), (2, 1)])
def test_a_long_text_is_read_in_windows(stories, plain, max_length, stride):
    text = f"{STORY} {SHUFFLED}"
    reward = perplexity(stories, reward_mode="neg_loss", max_length=max_length, stride=stride)
    assert reward(text) == pytest.approx(-plain(text, max_length, stride), **ROUNDING)


def test_a_window_is_at_most_the_models_context(stories, plain):
    text = f"{STORY} " * 20
    assert perplexity(stories, reward_mode="neg_loss")(text) == pytest.approx(-plain(text, 512, 512), **ROUNDING)


def test_overlapping_windows_find_a_text_likelier_than_bare_ones(stories):
    bare, overlapping = (perplexity(stories, max_length=16, stride=stride)(STORY) for stride in (16, 4))
    assert overlapping > bare


@pytest.mark.parametrize(
    ("mode", "of_loss", "empty"),
    [
        ("exp_neg_loss", lambda loss: math.exp(-loss), 0.0),
        ("inverse", lambda loss: 1 / math.exp(loss), 0.0),
        ("neg_loss", lambda loss: -loss, -UNIFORM),
        ("raw", math.exp, 512.0),
    ],
)
def test_modes_are_functions_of_the_loss(stories, plain, mode, of_loss, empty):
    reward = perplexity(stories, reward_mode=mode)
    assert reward(STORY) == pytest.approx(of_loss(plain(STORY)), **ROUNDING)
    assert reward.score(["", " \n", None]) == pytest.approx([empty] * 3)


def test_exp_neg_loss_is_the_default_and_prefers_a_story_to_its_shuffled_words(stories):
    story, shuffled = perplexity(stories).score([STORY, SHUFFLED])
    assert 0.3 < story < 1 and shuffled < 0.05


def test_a_first_token_without_context_is_not_scored(tmp_path):
    # Its tokenizer adds no BOS.
    reward = make_reward({"type": "perplexity", "model": _language_model(tmp_path), "reward_mode": "raw"})
    num_tokens = reward._load(torch.device("cpu"))[1].config.vocab_size
    assert reward("cat") == pytest.approx(num_tokens)
    assert reward("cat dog") != pytest.approx(num_tokens, rel=1e-6)


def test_a_batch_scores_as_its_texts_alone_whatever_shares_a_forward_pass(stories, monkeypatch):
    texts = [STORY, SHUFFLED, "", *SHORT, STORY * 30]
    reward = perplexity(stories, reward_mode="neg_loss")
    alone = [reward(text) for text in texts]
    for room in (2**12, 1000, 1):
        monkeypatch.setattr(language_model, "TOKENS_PER_FORWARD", room)
        assert reward.score(texts) == pytest.approx(alone, **ROUNDING)


def test_slices_of_the_logits_change_nothing(stories, monkeypatch):
    whole = perplexity(stories)(STORY)
    monkeypatch.setattr(language_model, "LOGITS_PER_SLICE", 512 * 7)
    assert perplexity(stories)(STORY) == pytest.approx(whole, rel=1e-6)


def test_many_texts_share_a_forward_pass(stories, monkeypatch):
    reward, passes = perplexity(stories), []
    forward = language_model._forward
    monkeypatch.setattr(language_model, "_forward", lambda *a: (passes.append(len(a[1])), forward(*a))[1])
    reward.score([f"{STORY} {i}" for i in range(40)])
    assert passes == [40]


@pytest.mark.slow
def test_a_hundred_thousand_characters_have_a_finite_score(stories):
    texts = ["word " * 20_000, "a" * 100_000]
    assert all(score > 1 for score in perplexity(stories, reward_mode="raw").score(texts))


def test_a_large_model_reads_four_windows_of_a_text(stories, monkeypatch):
    monkeypatch.setattr(language_model, "LONGEST", 0)
    reward = perplexity(stories, max_length=6, stride=6)
    tokens = reward._load(torch.device("cpu"))[0](STORY).input_ids
    assert len(tokens) > 24 and reward(STORY) == pytest.approx(reward(STORY + SHUFFLED), rel=1e-6)


def test_fluency_is_half_at_the_reference(stories, plain):
    own = math.exp(plain(STORY))
    for reference in (own, 3 * own):
        reward = make_reward({"type": "fluency", "model": stories, "reference": reference, "device": "cpu"})
        assert reward(STORY) == pytest.approx(1 / (1 + own / reference), **ROUNDING)


def test_fluency_prefers_a_story_and_an_empty_text_least(stories):
    reward = make_reward({"type": "fluency", "model": stories, "device": "cpu"})
    story, shuffled, *nasty, empty, blank = reward.score([STORY, SHUFFLED, *SHORT, "", " "])
    assert story > 0.9 and shuffled < 0.5 and empty == blank == 0.0
    assert all(0 < score < story for score in nasty)


def test_gptscore_is_the_mean_log_likelihood_of_the_response_after_the_rubric(stories, plain):
    reward = make_reward({"type": "gptscore", "model": stories, "rubric": "A story of {prompt}: ", "device": "cpu"})
    expected = [-plain(text, before="A story of Lily: ") for text in (STORY, *SHORT)]
    assert reward.score([STORY, *SHORT], prompts=["Lily"] * (1 + len(SHORT))) == pytest.approx(expected, **ROUNDING)
    assert reward("", prompt="Lily") == pytest.approx(-UNIFORM)


def test_gptscore_by_default_asks_for_an_answer_to_the_prompt(stories, plain):
    before = "Give a correct, relevant and fluent answer.\n\nWho is Lily?\n\nAnswer:\n"
    reward = make_reward({"type": "gptscore", "model": stories, "reward_mode": "exp_neg_loss", "device": "cpu"})
    expected = math.exp(-plain("A girl.", before=before))
    assert reward("A girl.", "unused", prompt="Who is Lily?") == pytest.approx(expected, **ROUNDING)


def test_gptscore_reads_past_the_context_in_windows(stories, plain):
    reward = make_reward(
        {"type": "gptscore", "model": stories, "rubric": "{target}", "max_length": 32, "stride": 8, "device": "cpu"}
    )
    assert reward(SHUFFLED, STORY) == pytest.approx(-plain(SHUFFLED, 32, 8, before=STORY), **ROUNDING)


def test_braces_in_a_samples_texts_are_text(stories, plain):
    reward = make_reward({"type": "gptscore", "model": stories, "rubric": "{prompt} {{target} ", "device": "cpu"})
    expected = -plain("{prompt} {0} {", before="{target} {prompt} {a toy ")
    assert reward("{prompt} {0} {", "a toy", prompt="{target} {prompt}") == pytest.approx(expected, **ROUNDING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "perplexity", "stride": 0}, r"REWARD.stride must be from 1 to max_length \(1024\), got 0"),
        (
            {"type": "perplexity", "stride": 9, "max_length": 8},
            r"REWARD.stride must be from 1 to max_length \(8\), got",
        ),
        ({"type": "perplexity", "max_length": 1}, "REWARD.max_length must be at least 2, got 1"),
        ({"type": "perplexity", "model": "/not/there"}, "REWARD.model '/not/there' does not exist"),
        ({"type": "perplexity", "reward_mode": "ppl"}, "REWARD.reward_mode must be one of 'exp_neg_loss', 'neg_loss',"),
        ({"type": "fluency", "reference": 0.5}, "REWARD.reference must be a perplexity, at least 1 and finite, got"),
        ({"type": "gptscore", "rubric": "{promt}"}, "rubric: unknown placeholder 'promt'; did you mean 'prompt'"),
        ({"type": "gptscore", "rubric": "{0}"}, "rubric: unknown placeholder '0'; known: prompt, target"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward(settings)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=f"model '{tmp_path}' cannot be loaded"):
        make_reward({"type": "perplexity", "model": str(tmp_path)})("a b")


def test_the_rewards_of_one_model_share_it(stories):
    loaded = [
        make_reward({"type": kind, "model": stories})._load(torch.device("cpu"))[1]
        for kind in ("perplexity", "fluency", "gptscore")
    ]
    assert loaded[0] is loaded[1] is loaded[2] and not loaded[0].training


def _language_model(folder):
    """A tiny GPT-2 whose tokenizer adds no special tokens."""
    import transformers

    saved = decoder(folder, ["LABEL_0"], kind="GPT2")
    config = transformers.AutoConfig.from_pretrained(saved)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(saved)
    return saved
