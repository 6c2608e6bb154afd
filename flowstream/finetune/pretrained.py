"""The pre-trained model, its tokenizer and its reference, with errors that fit on a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flowstream.finetune.settings import Settings
from flowstream.finetune.tokens import TokenDataset
from flowstream.scoring import CausalLMScorer, Scorer


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with a token to pad with. `ValueError` where there is none."""
    _check_path(name)
    tokenizer = _loaded(AutoTokenizer, name, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> Any:
    """The model's configuration. `ValueError` where there is none."""
    _check_path(name)
    return _loaded(AutoConfig, name, "configuration")


def load_model(settings: Settings) -> Any:
    """The model to train, with adapters where they are asked for.

    Trained parameters are fp32. A base that is not trained is bf16 with `--bf16`.
    """
    _check_path(settings.model)
    model = _loaded(AutoModelForCausalLM, settings.model, "causal language model", dtype=_dtype_of(settings))
    return model if settings.lora_rank is None else _with_adapters(model, settings)


def empty_models(settings: Settings) -> tuple[Any, Any | None]:
    """The model to train and the reference, if it is another one, as shapes without weights."""
    model = _empty(settings.model, _dtype_of(settings))
    if settings.lora_rank is not None:
        return _with_adapters(model, settings), None
    return model, _empty(settings.reference or settings.model, torch.float32)


def check_fits(name: str, config: Any, tokenizer: Any, samples: TokenDataset, spec: str) -> None:
    """`ValueError` for token ids or lengths that a model of this configuration cannot read."""
    text = config.get_text_config()
    largest = max(int(samples.ids.max()), int(tokenizer.pad_token_id))
    if largest >= text.vocab_size:
        raise ValueError(
            f"{name} has {text.vocab_size} tokens, and its tokenizer gives the id {largest}: take the one that it "
            "was trained with, or resize the model's embeddings"
        )
    longest, limit = int(samples.lengths.max()), getattr(text, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"{spec} has a sample of {longest} tokens, and {name} reads {limit}: set --max-length {limit}, with "
            "--overlong truncate or --overlong drop"
        )


def load_reference(settings: Settings, device: torch.device) -> Scorer | None:
    """The scorer of a full fine-tuning; `None` where the base of the trained model is the reference."""
    if settings.lora_rank is not None:
        return None
    return load_scorer(settings.reference or settings.model, bf16=settings.bf16, device=device)


def load_scorer(name: str, *, bf16: bool, device: torch.device) -> CausalLMScorer:
    """A frozen model that scores."""
    _check_path(name)
    dtype = torch.bfloat16 if bf16 else torch.float32
    scorer: CausalLMScorer = _loaded(CausalLMScorer, name, "causal language model", dtype=dtype, device=device)
    return scorer


def _dtype_of(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.bf16 and settings.lora_rank is not None else torch.float32


def _empty(name: str, dtype: torch.dtype) -> Any:
    config = load_config(name)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:  # which lists all configurations there are
            raise ValueError(f"{name} is a {config.model_type}, which is no causal language model") from error


def _with_adapters(model: nn.Module, settings: Settings) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=settings.lora_rank or 1,
        lora_alpha=settings.lora_alpha or settings.lora_rank or 1,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def _check_path(name: str) -> None:
    """`ValueError` for what can only be a path, and is none of a model."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} holds adapters only, as --no-merge writes them: give a folder with the whole model"
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: give a folder that save_pretrained wrote")
    elif path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}: give a folder that save_pretrained wrote, or a name on the Hub")


def _loaded(kind: Any, name: str, what: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ValueError(f"{name} has no {what} that could be loaded{offline}: {reason}") from error
