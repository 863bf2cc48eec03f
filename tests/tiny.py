"""Tiny random models of real families, for tests that need no trained one, and examples for them."""

import torch

COMMON = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen2": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True},
    "qwen3": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8},
    "gpt_neox": {**WIDE, "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": {**WIDE, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "gemma": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8},
    "gemma2": {
        **WIDE,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "head_dim": 8,
        "final_logit_softcapping": 3.0,
    },
    "cohere": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "granite": {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64, "logits_scaling": 8.0},
    "phi": {**WIDE, "max_position_embeddings": 64},
}
# hybrid.models.recurrent: one model_type, its settings by a name that stands for it here.
CELLS = {
    "lstm": {"cell": "lstm"},
    "gru": {"cell": "gru", "tie_word_embeddings": True},
    "slots": {"cell": "lstm", "memory_slots": 5, "memory_width": 6},
}


def tiny_model(family: str = "llama", *, seed: int = 0, std: float = 0.2, **overrides):
    """A causal LM of the family with weights large enough that its distribution is far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    own = FAMILIES.get(family, {})
    if family in CELLS:
        family, own = "hybrid_recurrent", {"hidden_size": 32, "num_hidden_layers": 2, **CELLS[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | own | overrides))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_policy(family: str = "llama", *, value_std: float = 0.1):
    """A policy on such a model, whose values are not all 0."""
    from hybrid.models import Policy

    policy = Policy(tiny_model(family)).eval()
    torch.nn.init.normal_(policy.value_head.linear.weight, std=value_std)
    return policy


def tiny_examples(*lengths: int, seed: int = 0):
    """Examples of so many tokens, of which the first two are the prompt."""
    from hybrid.core import Encoded

    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    return [Encoded(tuple(ids), (-100, -100, *ids[2:]), tuple(ids[:2]), "", "", {}) for ids in rows]
