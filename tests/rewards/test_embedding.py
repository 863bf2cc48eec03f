import json
import sys

import pytest
import torch
from rewards.checkpoints import NASTY, SENTIMENT, bert, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.embed import LONGEST, texts_of
from hybrid.rewards.leaves import embedding

VECTORS = {"east": [3.0, 0.0], "north": [0.0, 2.0], "west": [-1.0, 0.0], "northeast": [1.0, 1.0]}
# float32 sums in another order where rows are padded.
ROUNDING = 1e-6


class Compass:
    """An embedder of two dimensions, without a tokenizer. calls: what it was asked to encode."""

    def __init__(self):
        self.calls = []

    def encode(self, texts, **options):
        self.calls.append(texts)
        return torch.tensor([VECTORS[text] for text in texts])


@pytest.fixture
def compass(monkeypatch):
    embedder = Compass()
    monkeypatch.setattr(embedding, "load_embedder", lambda name, device: embedder)
    return embedder


@pytest.fixture(scope="module")
def plain(minilm):
    """What sentence-transformers itself says: (1 + cosine) / 2 of two texts, each encoded alone."""
    from sentence_transformers import SentenceTransformer, util

    embedder = SentenceTransformer(minilm, device="cpu")
    embedder.encode("the first takes seconds, which are no test's")
    return lambda a, b: (1 + util.cos_sim(embedder.encode(a), embedder.encode(b)).item()) / 2


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [("east", "east", 1.0), ("east", "north", 0.5), ("east", "west", 0.0), ("east", "northeast", (1 + 0.5**0.5) / 2)],
)
def test_sts_is_the_cosine_from_zero_to_one(compass, response, target, score):
    assert make_reward({"type": "cosine_sts"})(response, target) == pytest.approx(score, abs=1e-7)


def test_sts_encodes_each_text_once_and_all_in_one_call(compass):
    reward = make_reward({"type": "sts"})
    assert reward.score(["east", "north", "east", ""], ["north", "west", "east", "west"]) == [0.5, 0.5, 1.0, 0.0]
    assert [sorted(call) for call in compass.calls] == [["east", "north", "west"]]


@pytest.mark.slow
def test_sts_of_nasty_texts_is_the_librarys(minilm, plain):
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    texts = [text for text in NASTY if text.strip()]
    for target in ("the kitten is good", "日本語"):
        expected = [plain(text, target) for text in texts]
        assert reward.score(texts, [target] * len(texts)) == pytest.approx(expected, abs=ROUNDING)


def test_sts_of_equal_texts_is_one(minilm):
    texts = [text for text in NASTY if text.strip()]
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    assert reward.score(texts, texts) == pytest.approx([1.0] * len(texts), abs=1e-12)


def test_sts_tells_a_kitten_from_a_law(minilm):
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    near, far = reward.score(["A cat sits."] * 2, ["A kitten is sitting.", "The law was passed in June."])
    assert near > 0.8 and far < 0.6


@pytest.mark.parametrize(("response", "target"), [("", ""), ("", "cat"), ("cat", ""), (" \n", "cat"), (None, None)])
def test_sts_of_a_blank_text_is_zero(minilm, response, target):
    assert make_reward({"type": "sts", "model": minilm, "device": "cpu"})(response, target) == 0.0


def test_sts_of_texts_without_a_known_token_is_half_unless_they_are_equal(minilm):
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    assert reward.score(["🙂", "\x00", "🙂 🙃", "🙂"], ["🎉", "🎉", "🙂", "🙂"]) == [0.5, 0.5, 0.5, 1.0]


def test_sts_of_one_sample_is_that_of_a_batch(minilm):
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    targets = NASTY[::-1]
    single = [reward(response, target) for response, target in zip(NASTY, targets, strict=True)]
    assert reward.score(NASTY, targets) == pytest.approx(single, abs=ROUNDING)


def test_the_default_embedder_comes_from_pypi_where_it_is_installed(minilm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = make_reward({"type": "sts", "device": "cpu"})
    assert named("a cat", "a kitten") == make_reward({"type": "sts", "model": minilm, "device": "cpu"})(
        "a cat", "a kitten"
    )


def test_the_end_is_all_that_memory_compares(minilm):
    reward = make_reward({"type": "memory", "embedder": minilm, "window": 4, "device": "cpu"})
    assert reward("It rained. The cat sat down", "We sang. The cat sat down") == pytest.approx(1.0)
    assert reward("The cat sat down. It rained", "The cat sat down. We sang") < 0.99


def test_memory_of_nasty_texts_is_sts_of_their_last_fifty_tokens(minilm, plain):
    reward = make_reward({"type": "memory", "embedder": minilm, "device": "cpu"})
    target = "the man is good"
    ends = {"word " * 20_000: "word " * 50}
    texts = [text for text in NASTY if text.strip()]
    expected = [plain(ends.get(text, text), target) for text in texts]
    assert reward.score(texts, [target] * len(texts)) == pytest.approx(expected, abs=ROUNDING)
    assert reward.score(["", "cat"], ["cat", ""]) == [0.0, 0.0]


def test_a_window_of_more_than_the_embedder_reads_is_refused(minilm):
    reward = make_reward({"type": "memory", "embedder": minilm, "window": 255, "device": "cpu"})
    with pytest.raises(InputError, match=r"window must be at most 254, .* got 255"):
        reward("a", "b")


@pytest.mark.parametrize(("agg", "scores"), [("mean", [0.75, 0.25, (2 + 2**0.5) / 4]), ("max", [1.0, 0.5, 0.8535534])])
def test_style_is_nearness_to_the_exemplars(compass, agg, scores):
    reward = make_reward({"type": "style", "exemplars": ["east", "north"], "agg": agg})
    assert reward.score(["east", "west", "northeast"]) == pytest.approx(scores)
    assert sorted(compass.calls[0]) == ["east", "north"]  # once, not at every score


def test_style_takes_exemplars_from_a_file(compass, tmp_path):
    (tmp_path / "style.txt").write_text("east\nnorth\n")
    assert make_reward({"type": "style", "exemplars": str(tmp_path / "style.txt")})("east") == pytest.approx(0.75)


def test_style_by_a_classifier_is_the_probability_of_the_label(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    reward = make_reward({"type": "style", "classifier": folder, "label": "positive", "device": "cpu"})
    expected = [plain_logits(folder, text).softmax(-1)[1].item() for text in ("the cat", "a good dog")]
    assert reward.score(["the cat", "a good dog", ""]) == pytest.approx([*expected, 0.0], abs=1e-5)


def test_a_label_that_the_classifier_does_not_have_is_refused(tmp_path):
    reward = make_reward({"type": "style", "classifier": bert(tmp_path, SENTIMENT), "label": "postive"})
    with pytest.raises(InputError, match=r"label must be a label of the model .* did you mean 'POSITIVE'"):
        reward("a cat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "style"}, "REWARD.exemplars or classifier must be given, and not both"),
        ({"type": "style", "exemplars": ["a"], "classifier": "b"}, "REWARD.exemplars or classifier must be given"),
        ({"type": "style", "classifier": "b"}, "REWARD.label must be given with a classifier and only then"),
        ({"type": "style", "exemplars": []}, "REWARD.exemplars must hold at least one text"),
        ({"type": "style", "exemplars": "/not/there.txt"}, "REWARD.exemplars '/not/there.txt' cannot be read"),
        ({"type": "memory", "window": 0}, "REWARD.window must be at least 1, got 0"),
        ({"type": "memory", "embedder": "/not/there"}, "REWARD.embedder '/not/there' does not exist"),
        ({"type": "sts", "model": "/not/there"}, "REWARD.model '/not/there' does not exist"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward(settings)


@pytest.mark.parametrize(
    "spec", [{"type": "cosine_sts"}, {"type": "memory"}, {"type": "style", "exemplars": ["a"]}], ids=lambda s: s["type"]
)
def test_without_the_library_the_reward_says_what_to_install(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=f"reward '{spec['type']}' needs sentence_transformers: pip install"):
        make_reward(spec)


def test_a_folder_that_is_no_model_is_named(minilm, tmp_path):
    with pytest.raises(InputError, match=f"model '{tmp_path}' cannot be loaded as a sentence embedder: .+") as caught:
        make_reward({"type": "sts", "model": str(tmp_path)})("a", "b")
    assert "\n" not in str(caught.value)


def test_texts_of_a_file_are_its_lines_or_its_paragraphs_or_its_json_texts(tmp_path):
    files = {
        "lines.txt": "one\ntwo \n",
        "parts.txt": "one\nmore\n \ntwo\n\n\n",
        "rows.jsonl": "\n".join(json.dumps({"text": text, "id": 1}) for text in ("one\n\nmore", "two\u2028", " ")),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    read = [texts_of(str(tmp_path / name), "corpus") for name in files]
    assert read == [["one", "two "], ["one\nmore", "two"], ["one\n\nmore", "two\u2028"]]


@pytest.mark.parametrize("row", ["not json", '{"body": "x"}', "[1]", '{"text": 1}'])
def test_a_bad_row_of_a_corpus_is_refused(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + row)
    with pytest.raises(InputError, match=r"corpus .*(line 2 must be an object with a text|must hold texts, got 1)"):
        texts_of(str(tmp_path / "rows.jsonl"), "corpus")


def test_texts_are_read_to_their_first_twenty_thousand_characters(compass):
    VECTORS["e" * LONGEST] = VECTORS["east"]
    assert make_reward({"type": "sts"})("e" * 100_000, "east") == pytest.approx(1.0)


def test_a_text_that_the_embedder_reads_in_part_only_is_counted(minilm):
    reward = make_reward({"type": "sts", "model": minilm, "device": "cpu"})
    output = reward.score(["A cat sits.", "cat " * 500], ["A kitten.", "A dog."])
    assert output.parts["cosine_sts"].counts["truncated"] == 1
