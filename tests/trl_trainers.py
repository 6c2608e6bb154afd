"""What tests of TRL's trainer share: a tokenizer, data of each kind, a trainer that keeps its batches, a plain loop."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import trl
from conftest import build
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import flowstream as fs
from flowstream.integrations.config import FlowConfig
from flowstream.integrations.trl import FlowSFTTrainer

TAU = 4.0
RATE = 0.02

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ 'w5 ' + message.content + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ 'w4 ' + message.content + ' ' }}{% endif %}{% endfor %}"
)
"""A chat template that marks the assistant's turns, as TRL asks for."""


def tokenizer(template: str | None = None) -> Any:
    """A word an id, as the tiny models count them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ids = {word: number for number, word in enumerate([*named.values(), *(f"w{number}" for number in range(4, 97))])}
    built = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **named)


def words(num: int, seed: int) -> str:
    """The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{number}" for number in torch.randint(6, 97, (num,), generator=generator).tolist())


def completions(num: int = 30) -> Any:
    """Prompts and completions of many lengths."""
    rows = [(words(3 + row % 5, row), words(2 + row % 7, 31 * row)) for row in range(num)]
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": f" {text} </s>"} for prompt, text in rows])


def conversations(num: int = 30) -> Any:
    """Two turns each, of many lengths."""
    roles = ("user", "assistant", "user", "assistant")
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": words(2 + (row + turn) % 4, 17 * row + turn)}
                    for turn, role in enumerate(roles)
                ]
            }
            for row in range(num)
        ]
    )


def model() -> Any:
    """Sure of itself, so that its losses differ widely, and the weights with them."""
    tiny = build("llama", num_hidden_layers=1)
    with torch.no_grad():
        tiny.lm_head.weight *= 4
    return tiny


class Recorder(FlowSFTTrainer):
    """Keeps what it trains on: the batches of each step."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        kept = vars(self).setdefault("kept", defaultdict(list))
        kept[self.state.global_step].append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def steps(self) -> list[list[dict[str, Any]]]:
        """Of each step its batches."""
        return list(vars(self)["kept"].values())

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [batch for step in self.steps for batch in step]


def flow(**given: Any) -> FlowConfig:
    """At a temperature that is known, so that weights can be told without a stream."""
    return FlowConfig(**({"temperature": fs.FixedTemperature(TAU)} | given))


def trainer(
    folder: Path,
    *,
    kind: type[Any] = Recorder,
    base: Any = None,
    train_dataset: Any = None,
    template: str | None = None,
    flow: FlowConfig | None = None,
    peft_config: Any = None,
    eval_dataset: Any = None,
    **given: Any,
) -> Any:
    """`given` goes to the `SFTConfig`."""
    return kind(
        base or model(),
        arguments(folder, **given),
        train_dataset=train_dataset or completions(),
        eval_dataset=eval_dataset,
        processing_class=tokenizer(template),
        peft_config=peft_config,
        **({"flow": flow} if flow is not None else {}),
    )


def arguments(folder: Path, **given: Any) -> trl.SFTConfig:
    """Plain descent, under which a difference stays as small as it is."""
    plain: dict[str, Any] = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": RATE, "optim": "sgd"}
    plain |= {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_length": 32,
        "activation_checkpointing": False,
    }
    plain |= {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    plain |= {"save_strategy": "no", "logging_strategy": "no"}
    return trl.SFTConfig(output_dir=str(folder), **(plain | given))


# A plain loop to compare with: each document is read alone, and nothing of flowstream's or TRL's is used.


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document as it stands in a batch."""

    ids: Tensor
    labels: Tensor
    weight: Tensor
    """[n], what the batch says; ones where it says nothing."""

    @property
    def key(self) -> tuple[int, ...]:
        return (*self.ids.tolist(), *self.labels.tolist())

    @property
    def num_labels(self) -> int:
        return int((self.labels[1:] != -100).sum())


def documents(batch: dict[str, Any]) -> Iterator[Document]:
    """Those of a padded or packed batch."""
    ids, labels = batch["input_ids"], batch["labels"]
    weight = batch.get("flow_weight", torch.ones(len(ids)))
    weight = weight if weight.ndim == 2 else weight[:, None].expand(ids.shape)
    for row in range(len(ids)):
        num = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else ids.shape[1]
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist() if "position_ids" in batch else [0]
        for start, stop in zip(starts, [*starts[1:], num], strict=True):
            where = slice(start, stop)
            yield Document(ids=ids[row, where], labels=labels[row, where], weight=weight[row, where])


def token_losses(model: Any, document: Document, label_smoothing: float = 0.0) -> Tensor:
    """[n] of the labelled tokens, nats."""
    logits = model(input_ids=document.ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, document.labels[1:], reduction="none", label_smoothing=label_smoothing)[
        document.labels[1:] != -100
    ]


@torch.no_grad()
def flow_weight(reference: Any, document: Document) -> Tensor:
    """e^{-f/τ}, 0-d."""
    return torch.exp(-token_losses(reference, document).mean() / TAU)


@torch.no_grad()
def flow_token_weights(reference: Any, document: Document) -> Tensor:
    """e^{-f/τ} of each labelled token."""
    return torch.exp(-token_losses(reference, document) / TAU)


def ones(reference: Any, document: Document) -> Tensor:
    return torch.ones(())


def trained_by_hand(
    start: Any,
    steps: Iterable[list[dict[str, Any]]],
    *,
    reference: Any = None,
    weigh: Any = flow_weight,
    rate: float = RATE,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
) -> Any:
    """`start` after plain descent on Σ w·loss over the number of labels in all batches of a step."""
    model, reference = copy.deepcopy(start).train(), reference or start
    descent = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    known: dict[tuple[int, ...], Tensor] = {}
    for batches in steps:
        found = [document for batch in batches for document in documents(batch)]
        total = torch.zeros(())
        for document in found:
            losses = token_losses(model, document, label_smoothing)
            if loss_type == "dft":
                losses = losses * torch.exp(-losses).detach()
            if document.key not in known:
                known[document.key] = weigh(reference, document)
            total = total + (known[document.key] * losses).sum()
        (total / sum(document.num_labels for document in found)).backward()
        descent.step()
        descent.zero_grad()
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two models' parameters."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)
