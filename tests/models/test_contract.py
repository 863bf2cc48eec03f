"""What a model is refused for when its Backbone is built, and what is right for those that are taken."""

import pytest
import torch
from tiny import CELLS, WIDE, tiny_model
from torch import nn

from hybrid.core import InputError
from hybrid.models import Backbone, Policy, check_packing, context_length

GROUPED = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
DECODER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "is_decoder": True,
    "is_encoder_decoder": False, "pad_token_id": 0,
}  # fmt: skip
BLOCKS = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8,
}  # fmt: skip

WINDOWED = {
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {**GROUPED, "sliding_window": 8, "head_dim": 8, "pad_token_id": 0},
    "gemma3_text": {**GROUPED, "sliding_window": 8, "head_dim": 8, "pad_token_id": 0},
    "starcoder2": {**GROUPED, "sliding_window": 8},
    "olmo3": {**GROUPED, "sliding_window": 8, "pad_token_id": 0},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 8, "max_position_embeddings": 64},
    "llama4_text": {**GROUPED, **EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 8,
                    "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0], "pad_token_id": 0,
                    "layer_types": ["chunked_attention", "full_attention"]},
}  # fmt: skip
RECURRENT = {
    "mamba": STATE_SPACE,
    "mamba2": {**STATE_SPACE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": STATE_SPACE,
    **{cell: {} for cell in CELLS},
}
REFUSED = {
    "bart": (DECODER, "BartForCausalLM reads the padding"),
    "mbart": (DECODER, "MBartForCausalLM reads the padding"),
    "pegasus": (DECODER, "PegasusForCausalLM reads the padding"),
    "rwkv": ({**STATE_SPACE, "attention_hidden_size": 32, "context_length": 64}, "RwkvForCausalLM keeps no cache"),
    "openai-gpt": (BLOCKS, "OpenAIGPTLMHeadModel keeps no cache"),
    "bert": ({**WIDE, "is_decoder": True, "pad_token_id": 0}, "BertLMHeadModel computes its logits by more"),
    "mixtral": ({**GROUPED, **EXPERTS, "output_router_logits": True}, "MixtralForCausalLM asks for its router's loss"),
}


def built(family: str, **config):
    return tiny_model(family, std=0.3, **config)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (1, 21), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain(model, ids):
    """The log-probs of one row alone, from transformers' own forward."""
    return model(ids, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_model_cannot_do_it_is_refused_for_by_name(family):
    config, message = REFUSED[family]
    with pytest.raises(InputError, match=message):
        Backbone(built(family, **config))


def test_an_encoder_with_a_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder with a decoder"):
        Policy(T5ForConditionalGeneration(config))


def test_what_is_no_language_model_is_refused():
    with pytest.raises(InputError, match="got Linear"):
        Policy(nn.Linear(3, 3))


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_a_packed_segment_longer_than_a_window_keeps_the_window(family, ids):
    model = built(family, **WINDOWED[family])
    backbone = Backbone(model)
    check_packing(backbone, 64)
    row = torch.cat([ids[:, :5].flip(1), ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    segments = torch.tensor([[1] * 5 + [2] * 21 + [0] * 2])
    positions = torch.tensor([[*range(5), *range(21), 0, 0]])
    ours = backbone.logits(backbone(row, segments, positions)[:, 5:26]).log_softmax(-1)
    torch.testing.assert_close(ours, plain(model, ids), rtol=0, atol=2e-4)


def test_a_model_that_drops_its_window_in_packed_rows_is_refused(monkeypatch):
    backbone = Backbone(built("mistral", **WINDOWED["mistral"]))
    monkeypatch.setattr("hybrid.models.backbone.windows", lambda config: [])  # as if the mask had been ours
    with pytest.raises(InputError, match="MistralForCausalLM cannot keep packed examples apart"):
        check_packing(backbone, 64)
    check_packing(backbone, 10)  # no segment can be longer than the window


@pytest.mark.parametrize("family", RECURRENT)
@torch.no_grad()
def test_a_model_with_a_state_keeps_its_state_from_step_to_step(family, ids):
    model = built(family, **RECURRENT[family])
    backbone = Backbone(model)
    rows = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1), ids.repeat(1, 2)[:, :25]])
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    logits, cache = backbone.next_logits(rows[:, :15], mask[:, :15])
    for position in range(15, 25):
        logits, cache = backbone.next_logits(rows[:, position : position + 1], mask[:, : position + 1], cache)
    wanted = torch.cat([plain(model, ids)[:, -1], plain(model, rows[1:])[:, -1]])
    torch.testing.assert_close(logits.log_softmax(-1), wanted, rtol=0, atol=1e-3)


def test_a_cache_that_loses_the_context_is_noticed(monkeypatch):
    # As Mamba did: whatever was seen before is not handed on.
    lost = Backbone.next_logits
    monkeypatch.setattr(
        Backbone, "next_logits", lambda self, ids, mask, cache=None: lost(self, ids, mask[:, -ids.shape[1] :])
    )
    with pytest.raises(InputError, match="token by token"):
        Backbone(built("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mamba", "mistral", *CELLS])
def test_the_contract_holds_in_the_models_own_dtype(family, dtype, ids):
    # Weights of the size that training leaves: larger ones make rounding errors grow a thousandfold in Mamba.
    model = tiny_model(family, std=0.05, **{**RECURRENT, **WINDOWED}[family]).to(dtype)
    assert Backbone(model)(ids, torch.ones_like(ids)).dtype == dtype


@torch.no_grad()
def test_saturated_logits_take_no_part_in_the_measured_scale():
    model = tiny_model("gemma2", std=0.2, final_logit_softcapping=30.0).to(torch.bfloat16)
    ids = torch.arange(1, 8).unsqueeze(0)
    raw = model.lm_head(model.model(ids).last_hidden_state)
    model.lm_head.weight.mul_(120 / raw.abs().max())  # logits to 120 under a cap of 30; the embedding is tied
    assert Backbone(model).logit_scale == 1.0


def test_a_factor_of_the_logits_is_the_configs_own():
    assert Backbone(tiny_model("granite", logits_scaling=7.0).to(torch.bfloat16)).logit_scale == 1 / 7
    assert Backbone(tiny_model("cohere")).logit_scale == tiny_model("cohere").config.logit_scale


@pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
def test_lengths_past_a_ropes_switch_are_outside_the_context(family, kind):
    from transformers import AutoConfig

    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    switch = {"original_max_position_embeddings": 16, "pad_token_id": 0, "rope_parameters": rope}
    assert context_length(AutoConfig.for_model(family, **GROUPED, **switch)) == 16


def test_a_config_without_a_limit_has_none():
    from transformers import XLNetConfig

    assert context_length(XLNetConfig()) is None


def test_ids_without_a_token_have_no_probability_anywhere(tokenizer):
    backbone = Backbone(tiny_model("llama", vocab_size=110))
    backbone.fit_vocabulary(tokenizer)
    ids = torch.arange(1, 6).unsqueeze(0)
    logits, _ = backbone.next_logits(ids, torch.ones_like(ids))
    assert logits[:, 97:].eq(-torch.inf).all() and logits[:, :97].isfinite().all()
    hidden = backbone(ids, torch.ones_like(ids))
    from hybrid.fused import linear_logprob

    of_each = [
        linear_logprob(hidden[:, -1:], backbone.head_weight, torch.tensor([[token]]), bias=backbone.head_bias).logprob
        for token in range(97)
    ]
    torch.testing.assert_close(torch.cat(of_each, 1), logits[:, :97].log_softmax(-1))


def test_a_vocabulary_that_fits_is_left_alone(tokenizer):
    backbone = Backbone(tiny_model("llama"))
    backbone.fit_vocabulary(tokenizer)
    assert backbone.head_bias is None


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tokenizer):
    with pytest.raises(InputError, match="ids up to 96, and LlamaForCausalLM has 90 embeddings"):
        Backbone(tiny_model("llama", vocab_size=90)).fit_vocabulary(tokenizer)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for lm_head\.weight"):
        Policy.from_pretrained(tmp_path)


def test_a_value_head_of_another_size_is_refused(tmp_path):
    Policy(tiny_model("llama", hidden_size=16)).save_pretrained(tmp_path / "small")
    Policy(tiny_model("llama")).save_pretrained(tmp_path / "large")
    (tmp_path / "small" / "value_head.safetensors").replace(tmp_path / "large" / "value_head.safetensors")
    with pytest.raises(InputError, match=r"value head .* is another model's"):
        Policy.from_pretrained(tmp_path / "large")
