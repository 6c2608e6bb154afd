"""Tiny models, built from configurations: the same weights for the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "qwen2": ("Qwen2", _DECODER),
    "mistral": ("Mistral", _DECODER | {"sliding_window": 8}),
    "gemma2": ("Gemma2", _DECODER | {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0}),
    "cohere": ("Cohere", _DECODER | {"logit_scale": 3.0}),
    "granite": ("Granite", _DECODER | {"logits_scaling": 0.2}),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "mamba": ("Mamba", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}

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

CAUSAL_FAMILIES = tuple(_CAUSAL)


def build(name: str, **overrides: Any) -> Any:
    if name in _CAUSAL:
        family, settings = _CAUSAL[name]
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        kind = family + head
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
    if "causal_family" in metafunc.fixturenames:
        metafunc.parametrize("causal_family", CAUSAL_FAMILIES)
