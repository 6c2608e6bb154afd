"""`Trainer` on two ranks, each a process: one optimizer step is that of the union of their batches."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from spawned import run_ranks
from torch.utils.data import DataLoader
from trainers import KeepsBatches, Texts, assert_same_batches, collate, fixed, flow_trainer, sure_model
from transformers import Trainer

import flowstream as fs
from flowstream.integrations.config import FlowConfig
from flowstream.integrations.transformers import FlowTrainerMixin

NUM_STEPS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(port: int) -> int:
    """As after `accelerate launch --cpu`: the trainer makes the process group."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return rank


def parameters_of(model: Any) -> list[Any]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def ranks_trainer(folder: str | Path, flow: FlowConfig, **settings: Any) -> Any:
    model = sure_model(attention_dropout=settings.pop("dropout", 0.0))
    usual = {"max_steps": NUM_STEPS, "ddp_backend": "gloo", "train_dataset": Texts(40), "logging_steps": 2}
    return flow_trainer(model, Path(folder), flow, **(usual | settings))


class OwnLoaderTrainer(KeepsBatches, Trainer):
    """5 batches on rank 0, 3 on rank 1."""

    def get_train_dataloader(self) -> Any:
        rank = self.args.process_index
        rows: Any = Texts(40).rows[rank::2][: 12 if rank else 20]
        return DataLoader(rows, batch_size=4, collate_fn=collate)


class FlowOwnLoaderTrainer(FlowTrainerMixin, OwnLoaderTrainer):
    pass


def told(trainer: Any) -> dict[str, Any]:
    """What a rank sends home."""
    batches = [{name: value.tolist() for name, value in batch.items()} for batch in trainer.batches]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    metrics = trainer.flow_stream.metrics()
    return {"batches": batches, "parameters": parameters_of(trainer.model), "losses": losses, "metrics": metrics}


def live(port: int, folder: str) -> dict[str, Any]:
    """All that two ranks have to tell, in one pair of processes, which take seconds to begin."""
    join(port)
    return {"trained": train(folder), "resumed": resume(folder)}


def train(folder: str) -> list[dict[str, Any]]:
    """With `average_tokens_across_devices`, without it, and over unequal data."""
    outcomes = []
    for average in (True, False):
        trainer = ranks_trainer(folder, fixed(), average_tokens_across_devices=average)
        assert trainer.args.world_size == 2
        trainer.train()
        outcomes.append(told(trainer))
    trainer = ranks_trainer(folder, fixed(), gradient_accumulation_steps=2, kind=FlowOwnLoaderTrainer)
    trainer.train()
    return [*outcomes, told(trainer)]


def resume(folder: str) -> list[str]:
    """An interrupted training equals one that is not; the names of the files that it left."""
    settings = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 500, "optim": "adamw_torch"}
    settings |= {"learning_rate": 1e-3}
    flow = FlowConfig(temperature=fs.RunningMedian(warmup_samples=16), window=2)
    whole = ranks_trainer(Path(folder, "whole"), flow, **settings)
    whole.train()
    batches = []
    for stop in (3, 5, None):  # the epoch has 5 steps
        trainer = ranks_trainer(folder, flow, stop=stop, **settings)
        trainer.train(resume_from_checkpoint=None if stop == 3 else True)
        batches += trainer.batches
    assert_same_batches(batches, whole.batches)
    for one, two in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert trainer.flow_stream.metrics()["flow/tau"] == whole.flow_stream.metrics()["flow/tau"]
    return sorted(path.name for path in Path(folder, "checkpoint-5").glob("flowstream*"))


def one_process(ranks: list[dict[str, Any]], steps: list[range], average: bool = True) -> list[Any]:
    """The union of the ranks' batches in one process, by hand: plain cross-entropy times the weight."""
    model = sure_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, places in enumerate(steps):
        shares = [[{k: torch.tensor(v) for k, v in rank["batches"][at].items()} for at in places] for rank in ranks]
        numbers = [sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in share) for share in shares]
        for share, number in zip(shares, numbers, strict=True):
            for batch in share:
                labels = batch["labels"][:, 1:]
                logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
                nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                divisor = sum(numbers) if average else max(number, 1) * len(ranks)
                ((nll * batch["flow_weight"][:, None]).sum() / divisor).backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / NUM_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


def assert_close(ones: list[Any], others: list[Any]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-5)


SINGLE = [range(step, step + 1) for step in range(NUM_STEPS)]
PAIRS_OF_FIVE = [range(5 * epoch + first, 5 * epoch + min(first + 2, 5)) for epoch in range(3) for first in (0, 2, 4)]


def test_two_ranks_train_as_one_process_over_the_union_of_their_batches_and_resume_exactly(tmp_path):
    outcomes = run_ranks(live, 2, free_port(), str(tmp_path), timeout=150)
    assert [outcome.error for outcome in outcomes] == [None, None], outcomes[0].output
    results = [outcome.result for outcome in outcomes]

    for number, (average, steps) in enumerate([(True, SINGLE), (False, SINGLE), (True, PAIRS_OF_FIVE[:NUM_STEPS])]):
        ranks = [result["trained"][number] for result in results]
        assert_close(ranks[0]["parameters"], ranks[1]["parameters"])
        assert_close(ranks[0]["parameters"], one_process(ranks, steps, average))
        assert ranks[0]["metrics"]["flow/tau"] == ranks[1]["metrics"]["flow/tau"]
        assert [len(rank["batches"]) for rank in ranks] == [sum(map(len, steps))] * 2

    # A trainer of one process, which takes the batches of the two as micro-batches.
    alone = ranks_trainer(tmp_path, fixed(), gradient_accumulation_steps=2, ddp_backend=None)
    alone.train()
    of_two = results[0]["trained"][0]
    assert_close(of_two["parameters"], parameters_of(alone.model))
    losses = [log["loss"] for log in alone.state.log_history if "loss" in log]
    torch.testing.assert_close(of_two["losses"], losses, rtol=0, atol=1e-5)

    # Where data are unequal, the poorer rank takes part with batches of weight 0.
    rich, poor = (result["trained"][2] for result in results)
    assert all(max(batch["flow_weight"]) > 0 for batch in rich["batches"])
    padded = [all(weight == 0 for weight in batch["flow_weight"]) for batch in poor["batches"]]
    assert 0 < sum(padded) < len(padded)
    assert poor["metrics"]["flow/padded_batches"] > 0

    # `resume` has compared the batches and parameters.
    names = [f"flowstream-0000000005-rank-0000{rank}-of-00002.pt" for rank in (0, 1)]
    assert results[0]["resumed"] == names
