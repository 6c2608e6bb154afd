"""A task's own head: trained on the frozen body before fine-tuning, and exchanged for the original one after it.

The frozen model of FLOW must have an opinion of the new task's labels, and a pre-trained classifier has none: it gets a
new head first. The official code of arXiv 2502.02797 freezes the body's parameters and leaves it in train mode, so that
BatchNorm's statistics drift while it probes; here nothing of the body moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from flowstream.companions.wrapped import unwrapped
from flowstream.losses import weighted_cross_entropy
from flowstream.scoring.classifier import ClassifierScorer, Inputs
from flowstream.scoring.head import logits_of
from flowstream.scoring.reading import to_device

__all__ = ["classification_layer", "linear_probe", "with_original_head"]


def linear_probe(
    model: nn.Module,
    head: nn.Module | int | None,
    loader: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = 0.01,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    layer: str | None = None,
) -> nn.Module:
    """A copy of a classifier whose head alone was trained, by plain cross-entropy on the first `steps` batches.

    The copy shares nothing with `model`, which stays as it is; it comes in eval mode, as it was all along: no parameter
    and no buffer of the body moves, to the bit, and no dropout acts. Seed torch beforehand for the same new head.

        probe = fs.linear_probe(pretrained, num_classes, loader, steps=1000)
        stream = fs.FlowStream(loader, fs.ClassifierScorer(probe))  # weights from the probe, frozen

    A head trained until its median loss is near 0 leaves FLOW little to learn from: τ is that median, so what the probe
    gets wrong has weight 0, and what it gets right no gradient.

    Args:
        model: a classifier of images or texts, as `ClassifierScorer` takes it. One with PEFT adapters is refused.
        head: a module from the body's features to logits [B, C], of which a copy is trained; a number of classes, for
            an `nn.Linear`; or `None`, which trains the head that is there (after fine-tuning, the paper's last stage).
        loader: gives batches as `ClassifierScorer` reads them, soft targets included. It is begun anew when it ends
            before `steps`, and asked for no more batches than that.
        learning_rate: of SGD with momentum .9 and weight decay 5e-4, as in the official code.
        optimizer: from the head's parameters, in its place: `lambda parameters: AdamW(parameters, lr=1e-3)`.
        layer: name of the module that gives the logits, as in `model.named_modules()`; by default it is looked for.

    Raises:
        ValueError: where nothing tells which layer gives the logits, and for batches that are none.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: a head is trained for at least 1")
    with torch.inference_mode(False), torch.enable_grad():
        probed = _copied(model)
        name = layer if layer is not None else classification_layer(probed)
        old = _layer(probed, name)
        trained = _put_head(probed, name, head)
        parameters = list(trained.requires_grad_(True).parameters())
        reader = ClassifierScorer(probed, copy=False)
        make = optimizer or (lambda own: torch.optim.SGD(own, lr=learning_rate, momentum=0.9, weight_decay=5e-4))
        stepping = make(parameters)
        for number, batch in enumerate(_first(loader, steps)):
            inputs, targets = reader.read(batch, number)
            if not number:
                _check_layer(probed, name, old, inputs)
            features = _features(probed, name, inputs)
            try:
                logits = trained(features)
            except RuntimeError as error:
                if number:
                    raise
                raise ValueError(
                    f"the head does not take what the body gives it, {list(features.shape)}: {error}"
                ) from error
            if getattr(getattr(probed, "config", None), "problem_type", None) == "multi_label_classification":
                loss = F.binary_cross_entropy_with_logits(logits.float(), to_device(targets, logits.device))
            else:
                loss = weighted_cross_entropy(logits, targets, torch.ones(len(targets)))
            loss.backward()
            stepping.step()
            stepping.zero_grad()
    return probed


def with_original_head(tuned: nn.Module, original: nn.Module, *, layer: str | None = None) -> nn.Module:
    """A copy of `tuned`, in eval mode, with the head and all BatchNorm parameters and buffers of `original`.

    How the paper (arXiv 2502.02797) measures what a tuned body still knows of the original task. `layer` is the name of
    the head, as in `linear_probe`. Merge adapters beforehand. Raises ValueError where the two are not of one kind.
    """
    original = unwrapped(original)
    name = layer if layer is not None else classification_layer(original)
    restored = _copied(tuned)
    device = next(_layer(restored, name).parameters(), torch.empty(0)).device
    restored.set_submodule(name, copy.deepcopy(_layer(original, name)).to(device))
    norms = {path: module for path, module in original.named_modules() if isinstance(module, _BatchNorm)}
    found = {path for path, module in restored.named_modules() if isinstance(module, _BatchNorm)}
    if differing := sorted(norms.keys() ^ found):
        raise ValueError(f"{differing[0]} is a BatchNorm in one of the two models only: give the model before tuning")
    for path, norm in norms.items():
        try:
            restored.get_submodule(path).load_state_dict(norm.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{path} is another BatchNorm in the original model: {error}") from error
    config: Any = getattr(original, "config", None)
    own: Any = getattr(restored, "config", None)
    if hasattr(config, "id2label") and hasattr(own, "id2label"):
        own.id2label, own.label2id = dict(config.id2label), dict(config.label2id)
        _count_labels(restored, config.num_labels)
    return restored.eval()


def classification_layer(model: nn.Module) -> str:
    """The name of the layer that gives a classifier's logits: what timm says it is, or else the last `nn.Linear`.

    Of a Hugging Face model it has `config.num_labels` outputs. ValueError where there is no such layer, or several.
    """
    remedy = "pass layer=, the name of the module that gives the logits"
    kind = type(model).__name__
    asked: Any = getattr(model, "get_classifier", None)
    said = asked() if callable(asked) else None
    if isinstance(said, nn.Module):
        name = next((name for name, module in model.named_modules() if module is said), "")
        if isinstance(said, nn.Identity) or not name:
            raise ValueError(f"{kind} has no classifier (num_classes=0?): build it with one, or {remedy}")
        return name
    if isinstance(said, tuple | list):
        raise ValueError(f"{kind} has {len(said)} classifiers, whose logits are averaged: {remedy}")
    linear = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError(f"{kind} has no nn.Linear: {remedy}")
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    alike = [name for name, found in linear.items() if found.out_features == num_labels and name.count(".") < 2]
    if len(alike) > 1:
        raise ValueError(f"{kind} has several layers of {num_labels} outputs ({', '.join(alike)}): {remedy}")
    names: list[str] = alike or list(linear)
    return names[-1]


# The head


class _Reached(Exception):
    """The body's pass has come to the head."""


def _copied(model: nn.Module) -> nn.Module:
    if getattr(unwrapped(model), "peft_config", None) is not None:
        raise ValueError("the model carries PEFT adapters: merge them first (model.merge_and_unload())")
    return copy.deepcopy(unwrapped(model)).eval()


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [found for found, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; its last linear ones are {names[-3:]}"
        ) from None


def _put_head(model: nn.Module, name: str, head: nn.Module | int | None) -> nn.Module:
    """Put the head into the model; it itself."""
    old = _layer(model, name)
    if head is None:
        return old
    like = next(old.parameters(), torch.empty(0))
    if isinstance(head, nn.Module):
        new = copy.deepcopy(head).to(like.device, like.dtype).eval()
    elif not isinstance(old, nn.Linear):
        raise ValueError(
            f"layer {name} is a {type(old).__name__}, whose inputs nobody counts: give the head as a module"
        )
    elif head < 2:
        raise ValueError(f"a head of {head} classes: give 2 or more, or a module")
    else:
        new = nn.Linear(old.in_features, head).to(like.device, like.dtype).eval()
    model.set_submodule(name, new)
    outputs = [module.out_features for module in new.modules() if isinstance(module, nn.Linear)]
    config: Any = getattr(model, "config", None)
    if outputs and getattr(config, "num_labels", outputs[-1]) != outputs[-1]:
        config.num_labels = outputs[-1]  # names of the classes, too
        _count_labels(model, outputs[-1])
    return new


def _count_labels(model: Any, num: int) -> None:
    """Tell a Hugging Face model, whose own loss reads it, how many classes there are."""
    if hasattr(model, "num_labels"):
        model.num_labels = num


def _check_layer(model: nn.Module, name: str, old: nn.Module, inputs: Inputs) -> None:
    """`ValueError` unless what the layer gave are the model's logits: asked with the old one in its place."""
    given: list[Any] = []
    new = model.get_submodule(name)
    model.set_submodule(name, old)
    handle = old.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        with torch.no_grad():
            logits = logits_of(inputs.run(model))
    finally:
        handle.remove()
        model.set_submodule(name, new)
    if len(given) != 1 or not isinstance(given[0], Tensor) or not torch.equal(given[0], logits):
        raise ValueError(
            f"the logits of {type(model).__name__} are not what its layer {name} gives: pass layer=, the name of the "
            "module that gives them; where something acts on its output (a softmax, a scale), let the model return it "
            "as it is"
        )


def _features(model: nn.Module, name: str, inputs: Inputs) -> Tensor:
    """What the head takes; the model is run no further."""
    with _stopping_at(model.get_submodule(name)) as reached, suppress(_Reached), torch.no_grad():
        inputs.run(model)
    features: Tensor = reached[0]
    return features


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    reached: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reached.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield reached
    finally:
        handle.remove()


# Batches


def _first(loader: Iterable[Any], num: int) -> Iterator[Any]:
    """The first batches, over as many epochs as it takes."""
    left = num
    while left:
        before = left
        for batch in islice(loader, left):
            left -= 1
            yield batch
        if left == before:
            told = f"gave {num - left} of {num} batches, and none when begun anew" if left < num else "gave no batch"
            raise ValueError(f"the loader {told}: give one that can be iterated over again, or fewer steps")
