"""What a Hugging Face model is trained for: which scorer reads its batches, and which loss weights them."""

from __future__ import annotations

import inspect
import os
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flowstream.losses import weighted_cross_entropy, weighted_lm_loss
from flowstream.scoring import CausalLMScorer, ClassifierScorer, Seq2SeqLMScorer
from flowstream.scoring.adapters import layers_of, unwrapped
from flowstream.scoring.reference import TrainedAdapters

Task = Literal["causal language model", "encoder-decoder", "classifier"]

_SCORERS: dict[Task, type[CausalLMScorer | Seq2SeqLMScorer | ClassifierScorer]] = {
    "causal language model": CausalLMScorer,
    "encoder-decoder": Seq2SeqLMScorer,
    "classifier": ClassifierScorer,
}
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def task_of(model: nn.Module) -> Task:
    """What the model's own loss is. `ValueError` where flowstream has none for it."""
    base = bare(model)
    config, kind = getattr(base, "config", None), getattr(base, "loss_type", None)
    takes = inspect.signature(base.forward).parameters
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    is_causal = kind in ("ForCausalLM", "ForConditionalGeneration") or _is_named_causal(type(base).__name__)
    if is_causal and "input_ids" in takes:
        return "causal language model"
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(config, "num_labels", 1) > 1:  # of one label the model's own loss is a regression
        problem = "single_label_classification"
    if kind in _CLASSIFIERS and problem == "single_label_classification":
        return "classifier"
    raise ValueError(
        f"{type(base).__name__} is no causal language model, encoder-decoder or single-label classifier, whose losses "
        'flowstream knows how to weight: take mode="resample" with a scorer of your own (fs.FunctionScorer), or a '
        "training loop of your own around fs.FlowStream"
    )


def _is_named_causal(name: str) -> bool:
    """GPT2LMHeadModel and others, which have no `loss_type`. XLNet's and XLM's losses are not of the next token."""
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not name.startswith(("XLNet", "XLMWith"))


def bare(model: nn.Module) -> nn.Module:
    """The model without what torch.compile and PEFT have put around it."""
    while isinstance(base := getattr(model, "_orig_mod", None) or unwrapped(model), nn.Module):
        model = base
    return model


def scorer_of(
    model: nn.Module,
    reference: str | os.PathLike[str],
    *,
    device: torch.device | None = None,
    trained_adapters: TrainedAdapters = "refuse",
) -> CausalLMScorer | Seq2SeqLMScorer | ClassifierScorer:
    """A scorer for the model's batches; `reference` as in `FlowConfig`. A copy, or what is loaded, goes to `device`.

    Raises:
        ValueError: "base" of a model without adapters; a model that no scorer is for.
    """
    kind = _SCORERS[task_of(model)]
    if reference not in ("initial", "base"):
        of_images: dict[str, Any] = (
            {"images": True} if getattr(bare(model), "loss_type", None) == "ForImageClassification" else {}
        )
        return kind.from_pretrained(os.fspath(reference), device=device, **of_images)
    if layers_of(list(model.modules())):
        return kind(model, trained_adapters=trained_adapters)
    if reference == "base":
        raise ValueError(
            'reference is "base", and the model has no adapters that could be turned off: wrap it with PEFT first, or '
            'take reference="initial", a frozen copy'
        )
    return kind(model, copy=True, device=device, trained_adapters=trained_adapters)


def add_decoder_inputs(task: Task, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> None:
    """Tell an encoder-decoder, which is not given its labels, what its decoder reads."""
    if task == "encoder-decoder" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = bare(model).prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]


def weighted_loss(
    task: Task, outputs: Any, labels: Tensor, weight: Tensor, *, denominator: Any, label_smoothing: float = 0.0
) -> Tensor:
    """The weighted loss of a model's outputs, 0-d fp32, in nats a token or sample.

    `denominator`: labelled tokens or samples, over all that share the step; `None`: of this batch.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    options = {"label_smoothing": label_smoothing}
    if task == "causal language model":
        return weighted_lm_loss(logits, labels, weight, denominator=_or(denominator, "tokens"), **options)
    if task == "classifier" and labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} numbers, which the model's own loss takes for several labels a sample, or for "
            "values: flowstream weights classes, one integer a sample"
        )
    own = "samples" if task == "classifier" else "tokens"
    return weighted_cross_entropy(logits, labels, weight, denominator=_or(denominator, own), **options)


def router_loss(model: nn.Module, outputs: Any) -> Tensor | float:
    """What a mixture of experts adds to balance them: no sample's, so that no weight applies."""
    found = outputs.get("aux_loss") if isinstance(outputs, dict) else None
    if found is None:
        return 0.0
    balance: Tensor = bare(model).config.get_text_config().router_aux_loss_coef * found  # type: ignore[union-attr,operator]
    return balance


def _or(denominator: Any, own: str) -> Any:
    return own if denominator is None else denominator
