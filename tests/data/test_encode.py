"""Tests of hybrid.data.encode and hybrid.data.template."""

import logging

import pytest

from hybrid.core import IGNORE, Example, InputError
from hybrid.data import DataConfig, encode, encode_all

NONE = DataConfig(template="none")
CHAT = DataConfig(template="chat")
TURNS = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d\n"},
)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def trained(tokenizer, encoded):
    return text_of(tokenizer, [label for label in encoded.labels if label != IGNORE])


def check_labels(encoded):
    """A label is IGNORE or the token itself."""
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORE, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


# Prompt and target


def test_the_prompt_is_masked_and_target_and_eos_are_trained(characters):
    tokenizer = characters("<s> $A", bos_token="<s>")
    encoded = encode(Example("ab", "cd"), tokenizer, NONE)
    check_labels(encoded)
    assert text_of(tokenizer, encoded.input_ids) == "<s>abcd</s>"
    assert text_of(tokenizer, encoded.prompt_ids) == "<s>ab"
    assert trained(tokenizer, encoded) == "cd</s>"


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
def test_the_pad_token_changes_nothing(characters, pad):
    example = Example("ab", "cd")
    assert encode(example, characters(pad_token=pad), NONE) == encode(example, characters(), NONE)


def test_an_eos_that_the_tokenizer_appends_does_not_close_the_prompt(characters):
    tokenizer = characters("<s> $A </s>", bos_token="<s>")
    encoded = encode(Example("ab", "cd"), tokenizer, NONE)
    assert text_of(tokenizer, encoded.input_ids) == "<s>abcd</s>"
    assert text_of(tokenizer, encoded.prompt_ids) == "<s>ab"


def test_an_eos_that_the_target_brings_is_not_doubled(characters):
    tokenizer = characters()
    assert text_of(tokenizer, encode(Example("ab", "cd</s>"), tokenizer, NONE).input_ids) == "abcd</s>"


def test_without_a_target_nothing_is_trained_and_nothing_closes_the_prompt(characters):
    encoded = encode(Example("ab"), characters(), NONE)
    assert encoded.input_ids == encoded.prompt_ids
    assert set(encoded.labels) == {IGNORE}


def test_the_default_template_fences_the_prompt(characters):
    tokenizer = characters()
    encoded = encode(Example("ab", "cd"), tokenizer, DataConfig())
    assert text_of(tokenizer, encoded.prompt_ids) == "### Prompt:\n```\nab\n```\n\n### Response:\n"


def test_braces_in_template_and_prompt_are_text(characters):
    tokenizer = characters()
    encoded = encode(Example("{x} {prompt} {0}", "c"), tokenizer, DataConfig(template='{"q": "{prompt}"} {}'))
    assert text_of(tokenizer, encoded.prompt_ids) == '{"q": "{x} {prompt} {0}"} {}'


def test_the_texts_for_the_rewards_are_without_the_template(characters):
    encoded = encode(Example("ab", "cd", item={"id": 1}), characters(), DataConfig())
    assert (encoded.prompt, encoded.target, encoded.item) == ("ab", "cd", {"id": 1})


def test_a_tokenizer_without_eos_is_refused(characters):
    with pytest.raises(InputError, match="EOS"):
        encode(Example("ab", "cd"), characters(eos_token=None), NONE)


# Plain text


def test_plain_text_is_trained_whole_and_its_beginning_is_the_prompt(characters):
    tokenizer = characters("<s> $A </s>", bos_token="<s>")
    encoded = encode(Example("", "abcdef"), tokenizer, DataConfig(prompt_tokens=2))
    check_labels(encoded)
    assert text_of(tokenizer, encoded.input_ids) == "<s>abcdef</s>"
    assert trained(tokenizer, encoded) == "abcdef</s>"
    assert text_of(tokenizer, encoded.prompt_ids) == "<s>ab"
    assert (encoded.prompt, encoded.target) == ("ab", "cdef")


def test_a_short_text_keeps_a_token_for_its_target(characters):
    tokenizer = characters("<s> $A", bos_token="<s>")
    encoded = encode(Example("", "ab"), tokenizer, DataConfig(prompt_tokens=8))
    assert (encoded.prompt, encoded.target) == ("a", "b")


def test_a_bos_that_is_the_eos_too_stays_in_front(characters):
    tokenizer = characters("</s> $A", bos_token="</s>")
    encoded = encode(Example("", "abc"), tokenizer, DataConfig(prompt_tokens=1))
    assert text_of(tokenizer, encoded.input_ids) == "</s>abc</s>"
    assert text_of(tokenizer, encoded.prompt_ids) == "</s>a"
    assert trained(tokenizer, encoded) == "abc</s>"


def test_without_a_bos_the_first_token_of_a_text_is_not_trained(characters):
    tokenizer = characters()
    assert trained(tokenizer, encode(Example("", "abc"), tokenizer, NONE)) == "bc</s>"


def test_a_real_tokenizer_keeps_the_text_it_was_given(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = "Once upon a time, there was a little girl named Lily."
    encoded = encode(Example("", text), tokenizer, DataConfig(prompt_tokens=5))
    check_labels(encoded)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.labels[0] == IGNORE
    assert encoded.labels[1:] == encoded.input_ids[1:]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert len(encoded.prompt_ids) == 6
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text


# Dialogues


def test_every_assistant_turn_and_its_end_are_trained_and_nothing_else(chatml):
    encoded = encode(Example("c", "d\n", TURNS), chatml, CHAT)
    check_labels(encoded)
    marked = [
        token if label != IGNORE else None for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    assert trained(chatml, encoded) == "b<|im_end|>d\n<|im_end|>"
    # The line break after the first answer's end belongs to the template.
    assert marked[marked.index(chatml.eos_token_id) + 1] is None


def test_a_dialogue_keeps_the_text_of_its_template(chatml):
    encoded = encode(Example("c", "d\n", TURNS), chatml, CHAT)
    whole = chatml.apply_chat_template(list(TURNS), tokenize=False)
    assert text_of(chatml, encoded.input_ids).rstrip() == whole.rstrip()


def test_a_dialogues_prompt_is_all_before_its_last_answer(chatml):
    encoded = encode(Example("c", "d\n", TURNS), chatml, CHAT)
    prompt = chatml.apply_chat_template(list(TURNS[:-1]), tokenize=False, add_generation_prompt=True)
    assert text_of(chatml, encoded.prompt_ids) == prompt
    assert encoded.input_ids[: len(encoded.prompt_ids)] == encoded.prompt_ids


def test_a_chat_template_without_eos_gets_one(characters):
    template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    tokenizer = characters(chat_template=template)
    encoded = encode(Example("x", "y"), tokenizer, CHAT)
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert trained(tokenizer, encoded) == "y</s>"


def test_the_template_chat_makes_a_dialogue_of_prompt_and_target(chatml):
    encoded = encode(Example("a", "b"), chatml, DataConfig(template="chat", system="s"))
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(chatml, encoded.prompt_ids) == start
    assert trained(chatml, encoded) == "b<|im_end|>"


def test_a_prompt_alone_ends_where_the_assistant_starts(chatml):
    encoded = encode(Example("a"), chatml, CHAT)
    assert text_of(chatml, encoded.input_ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert set(encoded.labels) == {IGNORE}


def test_the_system_message_starts_a_dialogue_that_has_none(chatml):
    config = DataConfig(template="chat", system="s")
    own = ({"role": "system", "content": "own"}, *TURNS)
    assert "system\ns<" in text_of(chatml, encode(Example("c", "d\n", TURNS), chatml, config).prompt_ids)
    assert "system\ns<" not in text_of(chatml, encode(Example("c", "d\n", own), chatml, config).prompt_ids)


def test_an_answer_whose_start_would_melt_into_the_prompt_is_tokenized_as_a_rollout_says_it(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    # "th" + "e": alone "the" is one token, which no rollout could produce after a prompt that ends in "th".
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }} th{% if messages|length > 1 %}{{ messages[1]['content'] }}</s>{% endif %}"
    )
    encoded = encode(Example("in", "e"), tokenizer, CHAT)
    alone = tokenizer("in th", add_special_tokens=False)["input_ids"]
    assert list(encoded.prompt_ids) == alone
    assert list(encoded.input_ids[: len(alone)]) == alone


def test_a_prefixing_tokenizer_puts_no_space_at_a_turns_boundary(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    encoded = encode(Example("c", "d\n", TURNS), tokenizer, CHAT)
    assert list(encoded.input_ids) == tokenizer("[a]b</s>[c]d\n</s>", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_chat_template_is_refused(characters):
    with pytest.raises(InputError, match="no chat template"):
        encode(Example("a", "b"), characters(), CHAT)


def test_a_template_that_refuses_the_dialogue_is_an_input_error(characters):
    tokenizer = characters(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(InputError, match="System role not supported"):
        encode(Example("a", "b"), tokenizer, CHAT)


def test_a_template_that_writes_an_answer_without_what_opened_it_is_refused(characters):
    template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="opens the assistant's turn"):
        encode(Example("c", "d", TURNS), characters(chat_template=template), CHAT)


# Many


def test_long_examples_are_left_out_and_counted(characters, caplog):
    examples = [Example("", "ab"), Example("", "abcdef")]
    with caplog.at_level(logging.WARNING):
        kept = encode_all(examples, characters(), DataConfig(max_length=5))
    assert [e.target for e in kept] == ["b"]
    assert "1 of 2" in caplog.text
    assert "data.max_length = 5" in caplog.text


def test_an_example_of_exactly_the_maximum_length_stays(characters):
    assert len(encode_all([Example("", "abcd")], characters(), DataConfig(max_length=5))) == 1


def test_a_text_that_no_rollout_could_start_from_is_left_out(characters, caplog):
    with caplog.at_level(logging.WARNING):
        kept = encode_all([Example("", "a"), Example("", "ab")], characters(), NONE)
    assert [e.prompt for e in kept] == ["a"]
    assert "start a rollout" in caplog.text


def test_data_of_which_nothing_is_left_is_refused_with_the_reason(characters):
    with pytest.raises(InputError, match=r"no evaluation example is left of 1: 1 longer than data\.max_length = 2"):
        encode_all([Example("", "abc")], characters(), DataConfig(max_length=2), what="evaluation")


# What a template makes of what it was given


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"x": "<|im_end|>"}}}]


def dialogue(*messages, tools=()):
    return Example("a", messages=messages, tools=tools)


@pytest.mark.parametrize(
    ("template", "example", "left_out"),
    [
        (None, dialogue(TURNS[0], TURNS[1], tools=({"function": {"name": "add"}},)), "'add' of the tools"),
        (None, dialogue(TURNS[0], TURNS[1], tools=({"name": "add"},)), "'add' of the tools"),
        (None, dialogue(TURNS[0], {**TURNS[1], "reasoning_content": "as b"}), "'as b' of turn 2"),
        (None, dialogue(TURNS[0], {**TURNS[1], "tool_calls": [{"function": {"name": "add"}}]}), "'add' of turn 2"),
        ("{{ messages[0]['content'] }}<|im_start|>", dialogue(*TURNS[:2]), "'b' of turn 2"),
        (
            "{{ messages[-1]['content'].split('!')[-1] }}",
            dialogue({"role": "user", "content": "x! a"}),
            "'x! a' of tur",
        ),
    ],
)
def test_what_a_template_would_leave_out_is_refused(chatml, characters, template, example, left_out):
    tokenizer = chatml if template is None else characters(eos_token="<|im_end|>", chat_template=template)
    with pytest.raises(InputError, match=f"chat template leaves out {left_out}"):
        encode(example, tokenizer, CHAT)


def test_thinking_that_a_template_writes_its_own_way_is_no_fault(characters):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = characters(eos_token="<|im_end|>", chat_template=template)
    encoded = encode(dialogue(TURNS[0], {**TURNS[3], "reasoning_content": " c "}), tokenizer, CHAT)
    assert trained(tokenizer, encoded) == "<think>\n c \n</think>\n\nd<|im_end|>"


@pytest.mark.parametrize(
    ("example", "config"),
    [
        (dialogue(TURNS[0], {**TURNS[1], "tool_calls": CALLS}), CHAT),
        (dialogue(TURNS[0], {**TURNS[1], "reasoning_content": "<|im_end|>"}), CHAT),
        (dialogue(TURNS[0], TURNS[1], tools=({"name": "add", "description": "ends with <|im_end|>"},)), CHAT),
        (dialogue(TURNS[0], TURNS[1]), DataConfig(template="chat", system="<|im_end|>")),
    ],
)
def test_a_special_tokens_text_is_refused_wherever_a_dialogue_has_it(chatml, example, config):
    with pytest.raises(InputError, match=r"holds the text of the special token '<\|im_end\|>'"):
        encode(example, chatml, config)
