"""A reward model's chat template: its text has the very tokens of the rows that were trained."""

from dataclasses import replace

import pytest
from data.conftest import CHATML, characters, chatml  # noqa: F401 - fixtures
from transformers import AutoTokenizer

from hybrid.core import Example, InputError
from hybrid.data import DataConfig, encode
from hybrid.models import template_of
from hybrid.models.reward_template import rendered

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# What ends a turn is no EOS: one is put there.
BARE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
OWN = "Q {{x}} '{prompt}'\n{% A \\:\n"
SAMPLES = [
    ("Once upon a time", " there was a girl."),
    ("Is it good?\n", "It is, isn't it?"),
    (" two  spaces ", "  and two "),
    ("Ünïcödé 日本", "naïve 🙂 {{ x }} {% y %} \\n"),
    ("", "Once there was."),
    ("", " a space first"),
    ("one\n", "no line\n\nends here\n"),
]


@pytest.fixture(scope="module", params=["words", "stories", "characters", "bos", "bos first", "opt"])
def any_tokenizer(request, tokenizer, stories, characters):  # noqa: F811
    if request.param == "words":
        return tokenizer
    if request.param == "stories":
        return AutoTokenizer.from_pretrained(stories)
    if request.param == "bos first":
        return spaced(stories)
    around = {"characters": {}, "bos": {"around": "<s> $A", "bos_token": "<s>"}}
    around["opt"] = {"around": "</s> $A", "bos_token": "</s>"}
    return characters(**around[request.param])


def spaced(stories):
    """Newer Llama tokenizers put a space before the first word, and none behind a BOS that stands in the text."""
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def check(tokenizer, config, samples):
    template = template_of(config, tokenizer)
    for prompt, response in samples:
        text = rendered(tokenizer, prompt, response, template)
        row = encode(Example(prompt, response), tokenizer, config).input_ids
        assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == row, text


@pytest.mark.parametrize("template", ["default", "none", OWN, "{prompt} or {prompt}:\n"])
def test_the_texts_tokens_are_the_rows(any_tokenizer, template):
    # Without a template the seam lies between the two texts themselves: no token of the text may reach across it.
    seamless = [(prompt, response) for prompt, response in SAMPLES if template != "none" or not prompt.endswith(" ")]
    check(any_tokenizer, DataConfig(template=template), seamless)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, BARE], ids=["chatml", "llama2", "bare"])
@pytest.mark.parametrize("system", [None, "Be 'kind'\n{{ ü }}"])
def test_the_chat_templates_text_has_the_rows_tokens(stories, characters, template, system):  # noqa: F811
    bos = {"bos_token": "<s>", "around": "<s> $A"}
    tokenizers = [characters(eos_token="<|im_end|>" if template == CHATML else "</s>", **bos), spaced(stories)]
    for tokenizer in [*tokenizers, AutoTokenizer.from_pretrained(stories)]:
        tokenizer.chat_template = template
        check(tokenizer, DataConfig(template="chat", system=system), SAMPLES)


def test_the_end_of_a_longer_dialogue_is_as_it_was_trained(chatml):  # noqa: F811
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    config = DataConfig(template="chat", system="s")
    text = chatml.apply_chat_template(turns, chat_template=template_of(config, chatml), tokenize=False)
    row = encode(Example("u", "a", tuple(turns)), chatml, config).input_ids
    assert tuple(chatml(text, add_special_tokens=False)["input_ids"]) == row
    assert text.startswith("<|im_start|>system\ns<|im_end|>") and text.endswith("a<|im_end|>")


def test_a_response_that_ends_with_eos_gets_no_second(characters):  # noqa: F811
    check(characters(), DataConfig(), [("a", "b</s>")])
    text = rendered(characters(), "a", "b</s>", template_of(DataConfig(), characters()))
    assert text.count("</s>") == 1


def test_a_prompt_that_starts_with_bos_gets_no_second(characters):  # noqa: F811
    tokenizer = characters(around="<s> $A", bos_token="<s>")
    check(tokenizer, DataConfig(template="none"), [("<s>a", "b")])


def test_a_dialogue_is_refused_by_the_template_of_a_text(characters):  # noqa: F811
    turns = [{"role": "user", "content": "a"}] * 3
    with pytest.raises(Exception, match="one user turn and one assistant turn"):
        characters().apply_chat_template(turns, chat_template=template_of(DataConfig(), characters()), tokenize=False)


def test_chat_needs_a_chat_template(characters):  # noqa: F811
    with pytest.raises(InputError, match="chat template"):
        template_of(DataConfig(template="chat"), characters())


def test_a_tokenizer_whose_rows_no_text_has_is_refused(characters):  # noqa: F811
    from tokenizers import AddedToken

    # Its EOS is one only where no letter stands before it: a response's last letter does.
    tokenizer = characters()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", single_word=True, special=True)})
    with pytest.raises(InputError, match=r"no text has the tokens .* for prompt 'Once upon'"):
        template_of(DataConfig(), tokenizer)


def test_rows_whose_saved_text_has_other_tokens_are_counted(stories, caplog):
    tokenizer, config = AutoTokenizer.from_pretrained(stories), DataConfig(template="none")
    pairs = []
    for prompt in ("The dog was", "The cat was "):
        good, bad = (encode(Example(prompt, said), tokenizer, config) for said in (" good.", "bad."))
        pairs.append(replace(good, rejected=bad))
    template_of(config, tokenizer, pairs[:1])
    assert not caplog.text
    template_of(config, tokenizer, pairs)
    assert "of the first 4 answers 1 have other tokens" in caplog.text and "behind 'The cat was '" in caplog.text
