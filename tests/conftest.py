"""Tiny models, built from configurations: the same weights for the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from torch import nn

# No deadlines: machines are shared. And the same examples in every run: `make test` tells of the change at hand.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_PLAIN_HEADS = {key: value for key, value in _DECODER.items() if key != "head_dim"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_STATES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_MAMBA2_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
_LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
_LATENT |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}

_PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", _DECODER),
    "mistral": ("Mistral", _DECODER | {"sliding_window": 4}),
    "gemma2": (
        "Gemma2",
        _DECODER
        | {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
        | _WINDOWS,
    ),
    "gemma3": ("Gemma3Text Gemma3ForCausalLM", _DECODER | _WINDOWS),
    "cohere": ("Cohere", _DECODER | {"logit_scale": 3.0}),
    "granite": ("Granite", _DECODER | {"logits_scaling": 0.2, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _SIZES | {"max_position_embeddings": 64}),
    "phi": ("Phi", _PLAIN_HEADS),
    "opt": ("OPT", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "mixtral": ("Mixtral", _DECODER | _LOCAL_EXPERTS),
}
"""Families that are packed."""

_PADDED: dict[str, tuple[str, dict[str, Any]]] = {"mamba": ("Mamba", _STATES)}
"""A family that cannot be."""

_FURTHER_PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2", _DECODER | {"logit_scale": 3.0} | _WINDOWS),
    "deepseek_v2": ("DeepseekV2", _PLAIN_HEADS | _LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", _PLAIN_HEADS | _LATENT | {"q_lora_rank": 8}),
    "gemma": ("Gemma", _DECODER),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "llama_dynamic": (
        "Llama",
        _DECODER | {"max_position_embeddings": 6, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama_yarn": ("Llama", _DECODER | {"rope_parameters": _YARN}),
    "nemotron": ("Nemotron", _DECODER),
    "olmo2": ("Olmo2", _PLAIN_HEADS),
    "olmo3": ("Olmo3", _PLAIN_HEADS | _WINDOWS),
    "opt_projected": (
        "OPT",
        _SIZES
        | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "max_position_embeddings": 64},
    ),
    "phi3_longrope": (
        "Phi3",
        _PLAIN_HEADS
        | {"original_max_position_embeddings": 6}
        | {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 6}},
    ),
    "qwen2_moe": ("Qwen2Moe", _DECODER | _EXPERTS),
    "qwen3_moe": ("Qwen3Moe", _DECODER | _EXPERTS),
    "smollm3": ("SmolLM3", _DECODER | {"no_rope_layers": [1, 0]}),
    "starcoder2": ("Starcoder2", _PLAIN_HEADS | {"sliding_window": 4}),
}

_FURTHER_PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Bamba", _PLAIN_HEADS | {"attn_layer_indices": [1]} | _MAMBA2_HEADS),
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {key: value for key, value in _SIZES.items() if key != "intermediate_size"}),
    "falcon_h1": ("FalconH1", _DECODER | _MAMBA2_HEADS | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "gpt_oss": ("GptOss", _DECODER | _LOCAL_EXPERTS | _WINDOWS),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "lfm2": ("Lfm2", _PLAIN_HEADS | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "llama4": (
        "Llama4Text Llama4ForCausalLM",
        _DECODER
        | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4, "no_rope_layers": [1, 0]}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "mamba2": ("Mamba2", _STATES | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "mpt": ("Mpt", {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "qwen3_next": ("Qwen3Next", _DECODER | _EXPERTS | _LINEAR),
    "recurrent_gemma": (
        "RecurrentGemma",
        _DECODER | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
    ),
    "stablelm": ("StableLm", _PLAIN_HEADS),
}

_ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("Phimoe", _PLAIN_HEADS | _LOCAL_EXPERTS),
    "gemma3_multimodal": (
        "Gemma3 Gemma3ForConditionalGeneration",
        {
            "text_config": _DECODER | _WINDOWS,
            "vision_config": {key: _SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
            | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
            "mm_tokens_per_image": 4,
            "image_token_index": 96,
            "boi_token_index": 95,
            "eoi_token_index": 94,
        },
    ),
}

_CAUSAL = _ODD | _PACKED | _PADDED | _FURTHER_PACKED | _FURTHER_PADDED

_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "BertForSequenceClassification", _SIZES | {"num_labels": 3, "max_position_embeddings": 64}),
    "llama_classifier": ("Llama", "LlamaForSequenceClassification", _DECODER | {"num_labels": 3}),
    "vit": (
        "ViT",
        "ViTForImageClassification",
        {k: v for k, v in _SIZES.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8, "num_labels": 5},
    ),
    "t5": (
        "T5",
        "T5ForConditionalGeneration",
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "bart": (
        "Bart",
        "BartForConditionalGeneration",
        {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
    ),
}

CAUSAL_FAMILIES = tuple(_PACKED | _PADDED)
PACKED_FAMILIES = tuple(_PACKED | _FURTHER_PACKED)
PADDED_FAMILIES = tuple(_PADDED | _FURTHER_PADDED)


def build(name: str, **overrides: Any) -> Any:
    if name in _CAUSAL:
        family, settings = _CAUSAL[name]
        family, *named = family.split()
        kind = named[0] if named else "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    else:
        family, kind, settings = _OTHERS[name]
    config = getattr(transformers, family + "Config")(**(settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            # The usual initialisation is so small that a wrong position or neighbour would not show.
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(name, **config)`: a new model, in eval mode, with parameters that require gradients."""
    return build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, families in (
        ("causal_family", CAUSAL_FAMILIES),
        ("packed_family", PACKED_FAMILIES),
        ("padded_family", PADDED_FAMILIES),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, families)
