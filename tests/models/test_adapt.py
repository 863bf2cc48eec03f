"""LoRA and 4-bit: what trains, what the reference is, and what is saved."""

import json

import peft
import pytest
import torch
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from hybrid.core import InputError
from hybrid.models import LoraConfig, Policy, Reference, add_lora, under_adapter
from hybrid.models.adapt import without_adapter

pytestmark = pytest.mark.usefixtures("needs_peft")
LORA = LoraConfig(rank=2, alpha=4)


def stirred(policy):
    """The policy with adapters that do something: B is 0 when they are made."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def adapted(family="llama", lora=LORA, **overrides):
    model = tiny_model(family, **overrides)
    add_lora(model, lora)
    return Policy(model).eval()


def bits(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def assert_same_bits(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_only_adapters_and_value_head_train():
    names = [name for name, p in adapted().named_parameters() if p.requires_grad]
    assert names and all(".lora_A." in n or ".lora_B." in n or n.startswith("value_head.") for n in names)


def test_a_new_adapter_changes_nothing(tokens):
    assert torch.equal(adapted()(*tokens).hidden, Policy(tiny_model())(*tokens).hidden)


def test_named_target_modules_alone_are_adapted():
    policy = adapted(lora=LoraConfig(rank=2, target_modules=("q_proj", "down_proj")))
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in policy.named_parameters() if "lora_A" in name}
    assert layers == {"q_proj", "down_proj"}


def test_a_target_that_is_no_layer_is_refused_with_the_nearest():
    with pytest.raises(
        InputError, match=r"unknown layer in model\.lora\.target_modules: 'q_prj'; did you mean 'q_proj'"
    ):
        adapted(lora=LoraConfig(target_modules=("q_proj", "q_prj")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be >= 1"),
        ({"alpha": 0}, "alpha must be >= 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"target_modules": ()}, "target_modules must name a layer"),
    ],
)
def test_a_config_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("hybrid.models.adapt.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"model.lora needs peft.*pip install 'hybrid-trainer\[peft\]'"):
        LoraConfig()


def test_adapters_are_float32_over_bfloat16_weights(tokens):
    model = tiny_model().bfloat16()
    add_lora(model, LORA)
    assert {p.dtype for p in Policy(model).parameters() if p.requires_grad} == {torch.float32}
    assert model(tokens[0]).logits.dtype == torch.bfloat16


# The reference


def test_the_reference_of_an_adapted_policy_is_its_own_model():
    policy = adapted()
    reference = Reference.from_policy(policy)
    assert {p.data_ptr() for p in reference.backbone.parameters()} <= {p.data_ptr() for p in policy.parameters()}


def test_the_reference_stays_the_model_under_the_adapter(tokens):
    policy = adapted()
    reference = Reference.from_policy(policy)
    before = policy(*tokens).hidden
    assert torch.equal(reference.hidden(*tokens), before)
    stirred(policy)
    assert torch.equal(reference.hidden(*tokens), before)
    assert not torch.allclose(policy(*tokens).hidden, before)


def test_the_reference_has_no_dropout_while_the_policy_trains(tokens):
    policy = adapted("gpt2", resid_pdrop=0.5, lora=LoraConfig(rank=2, dropout=0.5))
    reference = Reference.from_policy(policy)
    before = policy(*tokens).hidden
    policy.train()
    assert torch.equal(reference.hidden(*tokens), before)
    assert all(module.training for module in policy.modules())


def test_the_adapter_is_on_again_and_as_trainable_as_it_was_after_an_error(tokens):
    policy = stirred(adapted())
    before, trained = policy(*tokens).hidden, {n: p.requires_grad for n, p in policy.named_parameters()}
    with pytest.raises(ZeroDivisionError), without_adapter(policy.backbone):
        raise ZeroDivisionError
    assert torch.equal(policy(*tokens).hidden, before)
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == trained
    policy.requires_grad_(False)
    with without_adapter(policy.backbone):
        pass
    assert not any(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_the_shared_reference_has_no_device_or_dtype_of_its_own(other):
    with pytest.raises(InputError, match="the policy's own model"):
        Reference.from_policy(adapted(), **other)


# Saving


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_policy_is_a_plain_model_with_the_adapter_in_its_weights(family, tokens, tmp_path):
    policy = stirred(adapted(family))
    before = bits(policy)
    policy.save_pretrained(tmp_path / "out")
    assert_same_bits(policy, before)
    assert not list((tmp_path / "out").glob("adapter*"))
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens[0]).logits
    # float32 rounding, of W' x against W x + B A x.
    torch.testing.assert_close(logits, policy.backbone.model(tokens[0]).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, tiny_model(family)(tokens[0]).logits, atol=1e-2)


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_comes_back_with_its_bits(base, tokens, tmp_path):
    policy = stirred(Policy.from_pretrained(base, lora=LORA))
    torch.nn.init.normal_(policy.value_head.linear.weight)
    policy.save_pretrained(tmp_path / "adapter", merge=False)
    assert under_adapter(tmp_path / "adapter") == str(base)
    assert_same_bits(Policy.from_pretrained(tmp_path / "adapter"), bits(policy))
    fresh = Policy.from_pretrained(base, lora=LORA)
    fresh.load_weights(tmp_path / "adapter")
    assert_same_bits(fresh, bits(policy))


def test_a_loaded_adapter_keeps_its_float32_over_bfloat16_weights(base, tmp_path):
    policy = stirred(Policy.from_pretrained(base, lora=LORA, dtype=torch.bfloat16))
    policy.save_pretrained(tmp_path / "adapter", merge=False)
    assert_same_bits(Policy.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16), bits(policy))


def test_a_loaded_adapter_trains_on(base, tmp_path):
    Policy.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "adapter", merge=False)
    loaded = Policy.from_pretrained(tmp_path / "adapter")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in Policy.from_pretrained(base, lora=LORA).named_parameters() if p.requires_grad
    }


def test_peft_reads_what_we_save(base, tokens, tmp_path):
    policy = stirred(Policy.from_pretrained(base, lora=LORA)).eval()
    policy.save_pretrained(tmp_path / "adapter", merge=False)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens[0]).logits, policy.backbone.model(tokens[0]).logits)


def test_no_file_of_an_adapter_is_a_pickle(base, tmp_path):
    Policy.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "adapter", merge=False)
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} == {".json", ".safetensors"}


def test_weights_of_another_kind_of_policy_are_refused(base, tmp_path):
    Policy.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "adapter", merge=False)
    with pytest.raises(InputError, match="holds an adapter's weights"):
        Policy.from_pretrained(base).load_weights(tmp_path / "adapter")
    with pytest.raises(InputError, match="holds a whole model's weights"):
        Policy.from_pretrained(base, lora=LORA).load_weights(base)
    with pytest.raises(InputError, match="other layers or another rank"):
        Policy.from_pretrained(base, lora=LoraConfig(rank=3)).load_weights(tmp_path / "adapter")


def test_an_adapter_of_another_rank_than_asked_for_is_refused(base, tmp_path):
    Policy.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "adapter", merge=False)
    with pytest.raises(InputError, match="has an adapter of rank 2 and alpha 4"):
        Policy.from_pretrained(tmp_path / "adapter", lora=LoraConfig(rank=8))


def test_an_adapter_folder_that_names_no_model_is_refused(base, tmp_path):
    Policy.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "adapter", merge=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not say which model"):
        Policy.from_pretrained(tmp_path / "adapter")


# Models that peft has adapted


def test_a_peft_model_is_taken_as_it_is(tokens):
    given = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    policy = stirred(Policy(given)).eval()
    assert torch.equal(policy.backbone.model(tokens[0]).logits, given(tokens[0]).logits)
    assert not torch.equal(Reference.from_policy(policy).hidden(*tokens), policy(*tokens).hidden)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora=True"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (peft.LoraConfig(target_modules=["q_proj", "lm_head"]), "leave embeddings and LM head alone"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Config"),
    ],
)
def test_an_adapter_that_is_more_than_lora_on_linear_layers_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        Policy(peft.get_peft_model(tiny_model(), config))


# 4 bits


@pytest.fixture
def four_bit(stories):
    pytest.importorskip("bitsandbytes")
    return stirred(Policy.from_pretrained(stories, lora=LORA, load_in_4bit=True)).eval()


def test_4_bit_weights_are_half_a_byte_and_the_rest_trains(four_bit):
    layer = four_bit.backbone.trunk.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() * 2 == layer.in_features * layer.out_features
    assert {p.dtype for p in four_bit.parameters() if p.requires_grad} == {torch.float32}


def test_4_bit_weights_without_an_adapter_are_refused(stories):
    with pytest.raises(InputError, match="load_in_4bit needs lora"):
        Policy.from_pretrained(stories, load_in_4bit=True)


def test_sampling_computes_what_training_computes_in_4_bit(four_bit, tokens):
    with torch.no_grad():
        alone = four_bit(*tokens).hidden
    four_bit.train()
    assert torch.equal(four_bit(*tokens).hidden, alone)


def test_a_saved_4_bit_policy_is_a_plain_float32_model(four_bit, tokens, tmp_path):
    before = bits(four_bit)
    four_bit.save_pretrained(tmp_path / "out")
    assert_same_bits(four_bit, before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    logits = four_bit.backbone.model(tokens[0]).logits
    torch.testing.assert_close(loaded(tokens[0]).logits, logits, rtol=1e-3, atol=1e-3)  # float32 rounding


def test_a_4_bit_adapter_comes_back_over_weights_quantized_anew(four_bit, tokens, tmp_path):
    four_bit.save_pretrained(tmp_path / "adapter", merge=False)
    loaded = Policy.from_pretrained(tmp_path / "adapter", load_in_4bit=True).eval()
    assert torch.equal(loaded(*tokens).hidden, four_bit(*tokens).hidden)


def test_a_reference_may_be_4_bit(stories, tokens):
    pytest.importorskip("bitsandbytes")
    policy = Policy.from_pretrained(stories, lora=LORA, load_in_4bit=True).eval()
    reference = Reference.from_pretrained(stories, load_in_4bit=True)
    assert torch.equal(reference.hidden(*tokens), policy(*tokens).hidden)


def test_an_adapter_whose_model_could_not_be_read_again_is_not_saved_alone(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    policy = Policy(model)
    add_lora(policy.backbone.model, LORA)
    with pytest.raises(InputError, match=r"embeddings have 105 rows, and .* has 97: save the model in a folder"):
        policy.save_pretrained(tmp_path / "alone", merge=False)
    assert not (tmp_path / "alone").exists()
    policy.save_pretrained(tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 105
    with pytest.raises(InputError, match="made in memory cannot be saved alone"):
        adapted().save_pretrained(tmp_path / "alone", merge=False)


def test_a_model_that_does_not_run_with_its_adapter_is_refused():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    model = tiny_model("phimoe", **FAMILIES["llama"] | experts)
    with pytest.raises(InputError, match=r"Phimoe.* cannot be run .*model\.lora\.target_modules"):
        add_lora(model, LORA)
    model = tiny_model("phimoe", **FAMILIES["llama"] | experts)
    add_lora(model, LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
