"""What tests of `Trainer` share: texts, tiny models, trainers that keep their batches, and the loop written by hand."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import build
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import flowstream as fs
from flowstream.integrations.config import FlowConfig
from flowstream.integrations.transformers import FlowTrainer

# Every `train()` collects garbage, a third of a second over all that is imported by now: leave that out of it.
gc.collect()
gc.freeze()

TAU = 4.0
RATE = 0.05
NUM_STEPS = 20
Rows = list[dict[str, Tensor]]


class Texts(Dataset[dict[str, Tensor]]):
    """42 texts of many lengths, a prompt before each: 11 batches of 4, no multiple of 4."""

    def __init__(self, num: int = 42) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for number in range(num):
            ids = torch.randint(3, 97, (5 + number % 11,), generator=generator)
            labels = ids.clone()
            labels[: number % 4] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def collate(rows: Rows) -> dict[str, Tensor]:
    """Padded on the right."""
    tensors = [{name: torch.as_tensor(row[name]) for name in ("input_ids", "labels")} for row in rows]
    width = max(len(row["input_ids"]) for row in tensors)

    def padded(name: str, value: int) -> Tensor:
        return torch.stack([F.pad(row[name], (0, width - len(row[name])), value=value) for row in tensors])

    mask = torch.stack([torch.arange(width) < len(row["input_ids"]) for row in tensors]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def sure_model(name: str = "llama", **config: Any) -> Any:
    """Of one layer, and sure of itself, so that its losses differ widely, and the weights with them."""
    model = build(name, **({"num_hidden_layers": 1} | config))
    with torch.no_grad():
        model.get_output_embeddings().weight *= 4
    return model


def with_lora(model: nn.Module, **settings: Any) -> Any:
    """The model under LoRA, with the same adapters each time."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "target_modules": "all-linear"} | settings)))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual: dict[str, Any] = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": RATE}
    usual |= {"max_steps": NUM_STEPS, "logging_steps": 5, "save_strategy": "no", "report_to": []}
    # By plain SGD a loss that is off by a factor shows, and rounding is not blown up.
    usual |= {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(usual | settings))


def fixed(**settings: Any) -> FlowConfig:
    """Weights that anyone can compute: τ is given."""
    return FlowConfig(**({"temperature": fs.FixedTemperature(TAU)} | settings))


class Keeping(TrainerCallback):
    """Stops at a step, and saves; keeps at which steps the stream's epoch ended."""

    def __init__(self, trainer: Any, stop: int | None = None) -> None:
        self.trainer, self.stop, self.ends = trainer, stop, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stream = getattr(self.trainer, "flow_stream", None)
        if stream is not None and stream.end_of_epoch:
            self.ends.append(state.global_step)
        if state.global_step == self.stop:
            control.should_training_stop = control.should_save = True


class KeepsBatches:
    """Mixed into a trainer: all that its steps were given, and all that it evaluated."""

    def __init__(self, *args: Any, stop: int | None = None, **kwargs: Any) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        super().__init__(*args, **kwargs)
        self.keeping = Keeping(self, stop)
        self.add_callback(self.keeping)  # type: ignore[attr-defined]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc,no-any-return]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.evaluated.append(dict(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class KeepingFlowTrainer(KeepsBatches, FlowTrainer):
    pass


class KeepingTrainer(KeepsBatches, Trainer):
    pass


def flow_trainer(model: Any, folder: Path, flow: FlowConfig | None = None, **settings: Any) -> KeepingFlowTrainer:
    """Over `Texts`; `settings` are the trainer's own, or of its arguments."""
    kind = settings.pop("kind", KeepingFlowTrainer)
    trainer: KeepingFlowTrainer = kind(flow=flow or fixed(), **_arranged(model, folder, settings))
    return trainer


def plain_trainer(model: Any, folder: Path, **settings: Any) -> KeepingTrainer:
    return KeepingTrainer(**_arranged(model, folder, settings))


_OF_TRAINER = ("train_dataset", "eval_dataset", "data_collator", "callbacks", "compute_metrics", "model_init", "stop")


def _arranged(model: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    usual: dict[str, Any] = {"train_dataset": Texts(), "data_collator": collate}
    own = usual | {name: value for name, value in settings.items() if name in _OF_TRAINER}
    rest = {name: value for name, value in settings.items() if name not in _OF_TRAINER}
    return {"model": model, "args": arguments(folder, **rest)} | own


# -- by hand ---------------------------------------------------------------------------------------


def steps_of(loader: Any, accumulate: int, num_steps: int = NUM_STEPS) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each step, epoch after epoch; an epoch's last step has what is left."""
    left = num_steps
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        batches = [dict(batch) for batch in loader]
        for first in range(0, len(batches), accumulate):
            if not left:
                return
            yield batches[first : first + accumulate]
            left -= 1


def losses_of(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, T-1] of the next tokens; as transformers' `LabelSmoother` has it, 0 where nothing is labelled."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    labels = labels[:, 1:]
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    mixed = (1 - smoothing) * nll + smoothing * -log_p.mean(-1)
    return mixed.masked_fill(labels == -100, 0.0)


def weights_by(reference: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """w = exp(-f/τ), f the mean loss of each sample alone under a copy of the model as it is."""
    reference, known = copy.deepcopy(reference).eval(), dict[tuple[int, ...], Tensor]()

    @torch.no_grad()
    def weight_of(ids: Tensor, labels: Tensor) -> Tensor:
        if (text := tuple(ids.tolist())) not in known:
            losses = losses_of(reference(input_ids=ids[None]).logits, labels[None])
            known[text] = torch.exp(-losses.sum() / (labels[1:] != -100).sum() / TAU)
        return known[text]

    def weigh(batch: dict[str, Tensor]) -> Tensor:
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        return torch.stack([weight_of(ids[:length], labels[:length]) for ids, labels, length in rows])

    return weigh


def train_by_hand(
    model: nn.Module,
    steps: Iterator[list[dict[str, Tensor]]],
    weigh: Callable[[dict[str, Tensor]], Tensor],
    *,
    smoothing: float = 0.0,
    num_steps: int = NUM_STEPS,
) -> None:
    """Σ w·loss / N over each step, N its labels; SGD with linear decay."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_steps))
    for step in steps:
        number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        for batch in step:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses = losses_of(logits, batch["labels"], smoothing)
            ((losses * weigh(batch)[:, None]).sum() / number).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def ones(batch: dict[str, Tensor]) -> Tensor:
    return torch.ones(len(batch["labels"]))


def assert_alike(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    """All parameters within `tolerance`."""
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_moved(model: nn.Module, other: nn.Module, at_least: float = 0.01) -> None:
    """Training has changed it, so that a comparison says something."""
    gaps = [
        float((one - two).detach().abs().max()) for one, two in zip(model.parameters(), other.parameters(), strict=True)
    ]
    assert max(gaps) > at_least


def of_reference(trainer: Any) -> set[int]:
    """Where the parameters of the frozen model lie in memory."""
    return places_of(trainer._flow_scorer._reference.model)


def places_of(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def assert_same_batches(batches: Rows, others: Rows) -> None:
    """Ids and weights to the bit."""
    assert len(batches) == len(others)
    for number, (one, two) in enumerate(zip(batches, others, strict=True)):
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one), f"batch {number}"
