"""Tokens are what the text says: seams, special tokens in content, BOS, the ends of turns, thinking, tools."""

import pytest
from transformers import AutoTokenizer

from hybrid.core import IGNORE, Example, InputError
from hybrid.data import DataConfig, encode, encode_all, encode_turns

NONE, CHAT = DataConfig(template="none"), DataConfig(template="chat")
BOS = {"around": "<s> $A", "bos_token": "<s>"}

# GLM's way: nothing closes a turn but the next role's marker.
UNCLOSED = (
    "{% for m in messages %}{{ ('<|im_start|>' if m['role'] == 'user' else '<|im_end|>') + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
# Qwen3's way: an answer's thinking is dropped as soon as a user's turn follows.
THINKING = (
    "{% set last = messages | map(attribute='role') | list %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and 'user' not in last[loop.index0:] and m['thinking'] %}"
    "<think>{{ m['thinking'] }}</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
TOOLS = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}{{ messages[0]['content'] }}{% for m in messages[1:] %}={{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"  # noqa: E501


def turns(*contents, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    messages[-1] |= last
    return tuple(messages)


def trained(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


# The seam


@pytest.mark.parametrize(("prompt", "target"), [("123", "45"), ("Once upon", " a time"), ("It was", "n't"), ("a", "b")])
def test_a_prefixing_tokenizer_puts_no_space_at_the_seam(stories, prompt, target):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    encoded = encode(Example(prompt, target), tokenizer, NONE)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == prompt + target
    assert encoded.prompt_ids == tuple(tokenizer(prompt)["input_ids"])


def test_the_ids_are_those_of_the_whole_text_where_it_goes_on(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    encoded = encode(Example("Once upon", " a time"), tokenizer, NONE)
    assert encoded.input_ids == (*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id)


# Special tokens in content


@pytest.mark.parametrize(
    ("prompt", "target"), [("a</s>b", "c"), ("a", "b</s>c"), ("a<|im_start|>", "b"), ("a", "<s>b")]
)
def test_a_special_tokens_text_stays_text(characters, prompt, target):
    tokenizer = characters(**BOS)
    encoded = encode(Example(prompt, target), tokenizer, NONE)
    characters_of = [tokenizer.convert_tokens_to_ids(c) for c in prompt + target]
    assert list(encoded.input_ids) == [tokenizer.bos_token_id, *characters_of, tokenizer.eos_token_id]


def test_a_special_tokens_text_in_plain_text_stays_text(characters):
    tokenizer = characters(**BOS)
    encoded = encode(Example("", "ab</s>cd"), tokenizer, DataConfig())
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    assert len(encoded.input_ids) == len("ab</s>cd") + 2


def test_a_special_tokens_text_beside_the_templates_own_is_refused(characters):
    config = DataConfig(template="<|im_start|>{prompt}<|im_end|>")
    with pytest.raises(InputError, match="cannot be told apart"):
        encode(Example("a</s>b", "c"), characters(**BOS), config)


def test_a_templates_own_special_tokens_are_special(characters):
    tokenizer = characters(**BOS)
    encoded = encode(Example("a", "b"), tokenizer, DataConfig(template="<|im_start|>{prompt}<|im_end|>"))
    assert len(encoded.prompt_ids) == 4


def test_a_special_tokens_text_in_a_dialogue_is_refused_with_the_example(chatml):
    example = Example("hello <|im_end|>", "b", turns("hello <|im_end|>", "b"))
    with pytest.raises(InputError, match=r"message 1 .*'<\|im_end\|>'.*The example: 'hello"):
        encode_all([example], chatml, CHAT)


# BOS and EOS


@pytest.mark.parametrize("example", [Example("<s>ab", "cd"), Example("", "<s>abcd"), Example("<s>a</s>b", "c")])
def test_a_text_that_begins_with_bos_has_one(characters, example):
    tokenizer = characters(**BOS)
    encoded = encode(example, tokenizer, NONE)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.labels[0] == IGNORE


def test_a_text_that_ends_with_eos_has_one(characters):
    tokenizer = characters(**BOS)
    for example in (Example("ab", "cd</s>"), Example("", "abcd</s>")):
        assert encode(example, tokenizer, NONE).input_ids.count(tokenizer.eos_token_id) == 1


def test_text_that_is_not_unicode_is_refused(characters):
    with pytest.raises(InputError, match="not valid Unicode"):
        encode(Example("a\ud800", "b"), characters(), NONE)


# Turns


def test_the_marker_that_ends_a_turn_is_trained(characters):
    tokenizer = characters(chat_template=UNCLOSED)
    encoded = encode(Example("c", "d", turns("a", "b", "c", "d")), tokenizer, CHAT)
    assert trained(tokenizer, encoded) == "b<|im_start|>d</s>"


def test_the_answers_before_a_users_last_turn_are_trained(chatml):
    encoded = encode(Example("c", "", turns("a", "b", "c")), chatml, CHAT)
    assert trained(chatml, encoded) == "b<|im_end|>"
    assert encoded.prompt_ids == encoded.input_ids
    assert chatml.decode(encoded.prompt_ids).endswith("c<|im_end|>\n<|im_start|>assistant\n")


def test_the_answers_of_a_prompt_are_not_trained(chatml):
    example = Example("c", "d", turns("a", "b", "c", "d"), num_prompt_messages=3)
    assert trained(chatml, encode(example, chatml, CHAT)) == "d<|im_end|>"


def test_each_answer_is_an_example_of_its_own_where_the_template_drops_earlier_thinking(characters):
    tokenizer = characters(eos_token="<|im_end|>", chat_template=THINKING)
    messages = (
        {**turns("a")[0]},
        {"role": "assistant", "content": "b", "thinking": "x"},
        *turns("c", "d", thinking="y"),
    )
    first, last = encode_turns(Example("c", "d", messages), tokenizer, CHAT)
    assert trained(tokenizer, first) == "<think>x</think>b<|im_end|>"
    assert tokenizer.decode(first.prompt_ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert trained(tokenizer, last) == "<think>y</think>d<|im_end|>"
    assert "x" not in tokenizer.decode(last.prompt_ids)
    assert (first.prompt, first.target, last.prompt, last.target) == ("a", "b", "c", "d")


def test_thinking_that_the_template_opens_and_the_answer_lacks_is_said(characters):
    tokenizer = characters(eos_token="<|im_end|>", chat_template=OPENED)
    with pytest.raises(InputError, match="opens the assistant's turn 2 with '<think>'"):
        encode(Example("a", "b", turns("a", "b")), tokenizer, CHAT)
    encoded = encode(Example("a", "b", turns("a", "b", thinking="x")), tokenizer, CHAT)
    assert trained(tokenizer, encoded) == "x</think>b<|im_end|>"


def test_tools_are_given_to_the_template(characters):
    tokenizer = characters(chat_template=TOOLS)
    encoded = encode(Example("a", "b", turns("a", "b"), tools=({"name": "add"},)), tokenizer, CHAT)
    assert tokenizer.decode(encoded.prompt_ids) == "[add]a="


@pytest.mark.parametrize("broken", ["{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_template_that_throws_is_said_with_the_example(characters, broken):
    with pytest.raises(InputError, match=r"template refuses .*The example: 'abc'"):
        encode_all([Example("abc", "b")], characters(chat_template=broken), CHAT)


# Tokenised rows


def test_a_tokenised_row_is_taken_as_it_is(characters):
    tokenizer = characters()
    ids = (10, 11, 12, 2)
    encoded = encode(Example("", input_ids=ids, labels=(IGNORE, IGNORE, 12, 2)), tokenizer, NONE)
    assert (encoded.input_ids, encoded.labels, encoded.prompt_ids) == (ids, (IGNORE, IGNORE, 12, 2), (10, 11))
    assert (encoded.prompt, encoded.target) == (tokenizer.decode([10, 11]), tokenizer.decode([12]))


def test_a_tokenised_row_with_an_id_outside_the_vocabulary_is_refused(characters):
    with pytest.raises(InputError, match="holds the id 600"):
        encode(Example("", input_ids=(5, 600)), characters(), NONE)
