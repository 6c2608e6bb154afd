"""Lightning: against a plain loop, and against itself without flowstream; resumed at any stop; two real ranks."""

from __future__ import annotations

import csv
import math
import os
import re
import runpy
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.distributed as dist
from conftest import build
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from spawned import run_ranks
from texts import make_samples, padded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import flowstream as fs
from flowstream.integrations.lightning import FlowCallback, FlowModule

# Lightning's own, of what a user may well do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning 2.6 under torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

NUM_SAMPLES, BATCH, NUM_BATCHES = 90, 4, 23
LENGTHS = tuple(4 + (7 * number) % 13 for number in range(NUM_SAMPLES))
SAMPLES = make_samples(LENGTHS)


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return padded(rows, "right")


def loader_of() -> DataLoader[Any]:
    """A part of the samples for each rank, shuffled by the epoch; the last batch is smaller."""
    sampler = fs.ElasticDistributedSampler(SAMPLES, shuffle=True)
    return DataLoader(SAMPLES, batch_size=BATCH, sampler=sampler, collate_fn=collate)


def stream_of(model: nn.Module, mode: str = "weight", accumulate: int = 1, **options: Any) -> fs.FlowStream:
    include = ("denominator",) if accumulate > 1 else ()
    temperature = fs.RunningMedian(warmup_samples=16)
    options = {"window": 4, "temperature": temperature, "include": include} | options
    return fs.FlowStream(loader_of(), fs.CausalLMScorer(model), mode=mode, accumulate=accumulate, **options)


def model_of(kind: str = "full") -> Any:
    model = build("llama")
    if kind == "lora":
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # unlike Adam's, its steps tell the scale of the loss


def trainer_of(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": -1, "enable_checkpointing": checkpoints, "accelerator": "cpu"} | quiet | options
    return pl.Trainer(callbacks=list(callbacks), **options)


def fit(model: Any, stream: Any, *callbacks: pl.Callback, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    flow = FlowCallback(stream)
    trainer = trainer_of(flow, *callbacks, **options)
    trainer.fit(FlowModule(model, optimizer=sgd), flow.loader, ckpt_path=ckpt_path)
    return trainer


def by_hand(model: Any, stream: fs.FlowStream, num_steps: int, accumulate: int = 1) -> None:
    """A plain loop: a step has the batches that share it, of one epoch, over their labelled tokens."""
    optimizer = sgd([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.train()
    step = 0
    while step < num_steps:
        epoch = list(stream)
        for at in range(0, len(epoch), accumulate):
            share = epoch[at : at + accumulate]
            num_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in share)
            for batch in share:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
                weight = batch.get("flow_weight", torch.ones(len(nll)))
                ((nll * weight[:, None]).sum() / num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == num_steps:
                return


class Recorder(pl.Callback):
    """What was trained on: epoch, step, number in the epoch, first tokens, and weights of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weight = batch.get("flow_weight", torch.zeros(1)).tolist()
        place = trainer.current_epoch, trainer.global_step, batch_idx
        self.seen.append((*place, batch["input_ids"][:, 0].tolist(), weight))


def check_equal(model: nn.Module, other: nn.Module, atol: float = 1e-5) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("mode", ["weight", "resample"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_twenty_steps_train_what_a_plain_loop_trains(kind, mode, accumulate):
    model, other = model_of(kind), model_of(kind)
    trainer = fit(model, stream_of(model, mode, accumulate), max_steps=20, accumulate_grad_batches=accumulate)
    by_hand(other, stream_of(other, mode, accumulate), 20, accumulate)
    assert trainer.global_step == 20
    check_equal(model, other)


class Plain(pl.LightningModule):
    """As people write it, without flowstream."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_with_all_weights_one_it_trains_what_lightning_alone_trains(accumulate):
    model, other = model_of(), model_of()
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate}
    stream = fs.FlowStream(loader_of(), fs.CausalLMScorer(model), policy=fs.Uniform())
    fit(model, stream, **options)
    trainer_of(**options).fit(Plain(other), loader_of())
    check_equal(model, other)


def test_losses_of_encoder_decoders_and_classifiers_are_weighted_by_the_sample():
    weight = torch.tensor([0.5, 0.2])
    t5, bert = build("t5"), build("bert")
    ids, labels = torch.arange(3, 13).view(2, 5), torch.tensor([[5, 6, 7], [8, 9, -100]])
    nll = F.cross_entropy(t5(input_ids=ids, labels=labels).logits.transpose(1, 2), labels, reduction="none")
    loss = FlowModule(t5).loss({"input_ids": ids, "labels": labels}, weight, None)
    torch.testing.assert_close(loss, (nll * weight[:, None]).sum() / 5)
    classes = torch.tensor([2, 0])
    nll = F.cross_entropy(bert(input_ids=ids).logits, classes, reduction="none")
    loss = FlowModule(bert).loss({"input_ids": ids, "labels": classes}, weight, torch.tensor(4.0))
    torch.testing.assert_close(loss, (nll * weight).sum() / 4)
    with pytest.raises(ValueError, match=r"a training batch has \['input_ids'\]: the weighted loss needs labels"):
        FlowModule(bert).loss({"input_ids": ids}, weight, None)


# -- resuming --------------------------------------------------------------------------------------


def check_resumed(
    full: nn.Module, whole: Recorder, path: Path, mode: str, accumulate: int, *callbacks: pl.Callback, **options: Any
) -> None:
    """From the checkpoint on, the same batches at the same places, and the same parameters at the end."""
    model, rest = model_of(), Recorder()
    fit(model, stream_of(model, mode, accumulate), rest, *callbacks, ckpt_path=path, **options)
    assert 0 < len(rest.seen) < len(whole.seen)
    assert rest.seen == whole.seen[-len(rest.seen) :]
    check_equal(model, full, atol=1e-6)


STOPS = [
    ("weight", 1, {"max_steps": 26}, (9, 23)),
    ("weight", 4, {"max_epochs": 2}, (2, 6)),
    ("resample", 1, {"max_epochs": 2}, (4, 9, 11)),
    ("resample", 4, {"max_steps": 8}, (2, 3, 4)),
]
"""The last batch of an epoch is step 23, 6, 9 and 3."""


@pytest.mark.parametrize(("mode", "accumulate", "length", "stops"), STOPS)
def test_resumed_within_an_epoch_and_at_its_last_batch_it_trains_on_the_same(mode, accumulate, length, stops, tmp_path):
    options = length | {"accumulate_grad_batches": accumulate}
    full, whole = model_of(), Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(full, stream_of(full, mode, accumulate), whole, keep, **options)
    for stop in stops:
        check_resumed(full, whole, tmp_path / f"step={stop}.ckpt", mode, accumulate, **options)


@pytest.mark.parametrize("length", [{"max_steps": 14}, {"max_epochs": 3}])
@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_resumed_between_epochs_and_a_second_time_it_trains_on_the_same(mode, length, tmp_path):
    options = length | {"accumulate_grad_batches": 4}
    full, whole = model_of(), Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(full, stream_of(full, mode, 4), whole, keep, **options)
    again = ModelCheckpoint(tmp_path / "again", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    check_resumed(full, whole, tmp_path / "epoch=0.ckpt", mode, 4, again, **options)
    last = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / "again").iterdir())[-2]
    check_resumed(full, whole, tmp_path / "again" / f"step={last}.ckpt", mode, 4, **options)


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_a_run_that_was_over_goes_on_with_more_steps(mode, tmp_path):
    full, whole = model_of(), Recorder()
    fit(full, stream_of(full, mode), whole, max_steps=14)
    keep = ModelCheckpoint(tmp_path, filename="over", save_on_train_epoch_end=True)
    model = model_of()
    fit(model, stream_of(model, mode), keep, max_steps=5)
    rest = Recorder()
    fit(model := model_of(), stream_of(model, mode), rest, ckpt_path=tmp_path / "over.ckpt", max_steps=14)
    assert [seen[3:] for seen in rest.seen] == [seen[3:] for seen in whole.seen[5:]]
    check_equal(model, full, atol=1e-6)


class Failing(FlowModule):
    """Its sixth step raises, once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 5:
            raise OSError("the power went out")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_saved_on_an_exception_it_goes_on_with_the_batch_that_failed(mode, tmp_path):
    full, whole = model_of(), Recorder()
    fit(full, stream_of(full, mode), whole, max_steps=14)
    model = model_of()
    flow = FlowCallback(stream_of(model, mode))
    keep = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True)
    with pytest.raises(OSError, match="the power went out"):
        trainer_of(flow, keep, max_steps=14).fit(Failing(model, optimizer=sgd), flow.loader)
    (path,) = tmp_path.iterdir()
    check_resumed(full, whole, path, mode, 1, max_steps=14)


def test_epochs_cut_by_limit_train_batches_are_cut_alike_after_a_resume(tmp_path):
    options = {"max_epochs": 3, "limit_train_batches": 5}
    full, whole = model_of(), Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(full, stream_of(full), whole, keep, **options)
    firsts = [seen[3] for seen in whole.seen if seen[2] == 0]
    assert len(firsts) == 3
    assert firsts[0] != firsts[1]  # another epoch has another order
    for stop in (3, 5, 10):
        check_resumed(full, whole, tmp_path / f"step={stop}.ckpt", "weight", 1, **options)


def test_a_checkpoint_holds_plain_values_and_one_without_a_state_is_refused(tmp_path):
    model = model_of()
    trainer = fit(model, stream_of(model), max_steps=2)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    saved = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert [state["num_delivered"] for state in saved["flowstream"]] == [2]
    del saved["flowstream"]
    torch.save(saved, tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match="the checkpoint has no state of flowstream: it was saved without"):
        fit(model_of(), stream_of(model_of()), ckpt_path=tmp_path / "without.ckpt", max_steps=3)


# -- what is around training -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_validation_has_the_models_own_loss_and_leaves_training_as_it_is(mode):
    model, other = model_of(), model_of()
    held_out = DataLoader(SAMPLES[:8], batch_size=8, collate_fn=collate)
    alone, beside = Recorder(), Recorder()
    fit(other, stream_of(other, mode), alone, max_steps=12)
    flow = FlowCallback(stream_of(model, mode))
    trainer = trainer_of(flow, beside, max_steps=12, val_check_interval=4, num_sanity_val_steps=1)
    trainer.fit(FlowModule(model, optimizer=sgd), flow.loader, held_out)
    assert beside.seen == alone.seen
    check_equal(model, other, atol=1e-6)
    (batch,) = held_out
    (measured,) = trainer.validate(FlowModule(model), held_out, verbose=False)
    assert measured["val_loss"] == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-6)


def test_validating_a_checkpoint_between_two_fits_moves_no_data(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    model = model_of()
    flow = FlowCallback(stream_of(model))
    trainer, module = trainer_of(flow, keep, max_steps=12), FlowModule(model, optimizer=sgd)
    trainer.fit(module, flow.loader)
    where = flow.stream.state_dict()["num_delivered"]
    trainer.validate(module, loader_of(), ckpt_path=str(tmp_path / "step=4.ckpt"), verbose=False)
    assert flow.stream.state_dict()["num_delivered"] == where


class Looking(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            next(iter(trainer.train_dataloader))


def test_a_callback_that_iterates_over_the_training_loader_does_not_end_training_without_a_word():
    model = model_of()
    with pytest.raises(RuntimeError, match="iterated over again while they were trained on"):
        fit(model, stream_of(model), Looking(), max_epochs=2)


def test_without_logging_it_trains():
    model = model_of()
    assert fit(model, stream_of(model), max_steps=2, log_every_n_steps=0).global_step == 2


class Skipping(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        weight = batch.pop("flow_weight")
        return None if batch_idx == 0 else super().training_step(batch, batch_idx) * weight.mean()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_batch_that_is_skipped_proves_nothing_and_the_next_one_does():
    model = model_of()
    flow = FlowCallback(stream_of(model))
    trainer_of(flow, max_steps=2).fit(Skipping(model), flow.loader)
    assert not flow._to_check


def test_a_look_pulls_nothing():
    loader = loader_of()
    model = model_of()
    stream = fs.FlowStream(loader, fs.CausalLMScorer(model))
    flow = FlowCallback(stream)
    iter(flow.loader)
    assert len(flow.loader) == NUM_BATCHES
    assert stream.metrics()["flow/samples_seen"] == 0


def test_metrics_of_the_stream_are_logged_with_the_loss(tmp_path):
    model = model_of()
    logger = pl.loggers.CSVLogger(tmp_path, name=None, version="")
    stream = stream_of(model, accumulate=2)
    fit(model, stream, logger=logger, max_steps=6, accumulate_grad_batches=2, log_every_n_steps=3)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "5"]
    assert all(math.isfinite(float(row["train_loss"])) for row in rows)
    assert float(rows[-1]["flow/tau"]) == pytest.approx(stream.metrics()["flow/tau"])


def test_mixed_precision_trains_near_full():
    model, other = model_of(), model_of()
    fit(model, stream_of(model), max_steps=10, precision="bf16-mixed")
    fit(other, stream_of(other), max_steps=10)
    check_equal(model, other, atol=0.02)


# -- the guard, and other mistakes -----------------------------------------------------------------


class Ignoring(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return super().training_step(batch, batch_idx)  # Llama swallows what it does not know


class OwnLoss(FlowModule):
    def loss(self, batch: dict[str, Tensor], weight: Tensor, denominator: Tensor | None) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


class PairLoss(Plain):
    """Takes `(batch, weight)`, and no number; logs as it goes."""

    def training_step(self, pair: Any) -> dict[str, Tensor]:  # type: ignore[override]
        batch, weight = pair
        loss = fs.weighted_lm_loss(self.model(**batch).logits, batch["labels"], weight)
        self.log("loss", loss)
        return {"loss": loss}


@pytest.mark.parametrize("kind", [Ignoring, OwnLoss])
def test_a_module_whose_loss_ignores_the_weights_is_named_at_the_first_step(kind):
    model = model_of()
    flow = FlowCallback(stream_of(model))
    with pytest.raises(ValueError, match=f"{kind.__name__}.training_step does not use the weights"):
        trainer_of(flow, max_steps=2).fit(kind(model), flow.loader)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_module_of_ones_own_takes_weights_beside_the_batch():
    model, other = model_of(), model_of()
    flow = FlowCallback(stream_of(model, attach="pair"))
    trainer = trainer_of(flow, max_steps=4)
    trainer.fit(PairLoss(model), flow.loader)
    by_hand(other, stream_of(other), 4)
    check_equal(model, other)


def test_what_does_not_fit_together_is_refused_with_the_remedy():
    model = model_of()
    stream = stream_of(model, accumulate=4)
    flow = FlowCallback(stream)
    module = FlowModule(model, optimizer=sgd)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2, and flow_denominator counts the labels of 4"):
        trainer_of(flow, max_steps=2, accumulate_grad_batches=2).fit(module, flow.loader)
    with pytest.raises(ValueError, match=r"was given FlowStream: give it the loader of the FlowCallback"):
        trainer_of(flow, max_steps=2, accumulate_grad_batches=4).fit(module, stream)
    with pytest.raises(ValueError, match="the Trainer has no FlowCallback"):
        trainer_of(max_steps=2).fit(module, FlowCallback(stream_of(model)).loader)
    with pytest.raises(ValueError, match="the Trainer does not have the callback"):
        trainer_of(max_steps=2).fit(Plain(model), FlowCallback(stream_of(model, "resample")).loader)
    with pytest.raises(ValueError, match="no causal language model, encoder-decoder or single-label classifier"):
        FlowModule(nn.Linear(2, 2))


# -- two ranks -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_on_two(port: int, folder: str) -> Any:
    """As a user's script: Lightning starts torch.distributed. 9 steps; then from step 4 on again."""
    warnings.simplefilter("ignore")
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "plugins": [LightningEnvironment()], "max_steps": 9}
    options |= {"accumulate_grad_batches": 2}
    model, whole = model_of(), Recorder()
    early = FlowCallback(stream_of(model_of(), accumulate=2))
    trained = []
    with pytest.raises(ValueError, match="built before Lightning started its 2 ranks"):
        trainer_of(early, **options).fit(FlowModule(model), early.loader)
    for path, steps in ((None, whole), (Path(folder, "step=4.ckpt"), Recorder())):
        model = model_of()
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [steps] if path else [steps, keep]
        fit(model, lambda model=model: stream_of(model, accumulate=2), *callbacks, ckpt_path=path, **options)
        trained.append((steps.seen, {name: value.detach().numpy() for name, value in model.named_parameters()}))
    return trained


def test_two_ranks_train_what_one_trains_with_their_batches_together_and_resume(tmp_path):
    ranks = run_ranks(train_on_two, 2, free_port(), str(tmp_path), timeout=100)
    assert [rank.error for rank in ranks] == [None, None], ranks[0].output + ranks[1].output
    other = model_of()
    loader = DataLoader(
        SAMPLES, batch_size=2 * BATCH, sampler=fs.ElasticDistributedSampler(SAMPLES), collate_fn=collate
    )
    options = {"window": 4, "temperature": fs.RunningMedian(warmup_samples=16), "accumulate": 2}
    by_hand(other, fs.FlowStream(loader, fs.CausalLMScorer(other), **options), 9, 2)
    for rank in ranks:
        (whole, full), (rest, resumed) = rank.result
        assert len(whole) == 18
        assert rest == whole[-len(rest) :]
        assert len(rest) == 10
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(torch.from_numpy(full[name]), parameter.detach(), atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.from_numpy(resumed[name]), torch.from_numpy(full[name]), atol=1e-6, rtol=0)
    assert ranks[0].result[0][0] != ranks[1].result[0][0]

    states = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["flowstream"]
    assert [state["rank"] for state in states] == [0, 1]
    alone, seen = model_of(), Recorder()  # one rank goes on behind what two have trained on
    options = {"max_steps": 7, "accumulate_grad_batches": 2}
    fit(alone, stream_of(alone, accumulate=2), seen, ckpt_path=tmp_path / "step=4.ckpt", **options)
    before = [token for rank in ranks for batch in rank.result[0][0][:8] for token in batch[3]]
    behind = [token for batch in seen.seen for token in batch[3]]
    left = Counter(int(ids[0]) for ids, _ in SAMPLES)
    left.subtract(before + behind)
    assert (len(before), len(behind)) == (64, 24)
    assert sorted(count for count in left.values() if count) in ([1, 1], [2])


# -- the example -----------------------------------------------------------------------------------


def test_example_learns_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    """In this process: to import Lightning takes longer than to train."""
    monkeypatch.chdir(tmp_path)
    script = str(Path(__file__).parents[2] / "examples" / "lightning_module.py")
    found = []
    for steps in ("5", "10"):
        monkeypatch.setattr(sys, "argv", [script, "--steps", steps])
        with torch.random.fork_rng():
            runpy.run_path(script, run_name="__main__")
        found += re.findall(r"^(\d+) samples, (\d+) steps, loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [(samples, steps) for samples, steps, _ in found] == [("80", "5"), ("160", "10")]
    assert float(found[1][2]) < float(found[0][2])
