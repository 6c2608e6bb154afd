"""A training run of which one rank is killed, once: begun again by torchrun, it goes on from its checkpoints.

`torchrun --nproc-per-node 2 --max-restarts 2 restarted_training.py FOLDER KILLED`, KILLED being the rank. Each step is
written down with the ids it trained on, by each rank in a file of its own; what is written of a step that was done
again replaces the older.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flowstream as fs

NUM_SAMPLES = (120, 68)
"""Of each rank."""
BATCH = 4
SAVE_EVERY = 8
KILLED_AT = 17
"""The step behind which a rank dies in the first life: the next window begins before the next checkpoint."""


def batches_of(rank: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(NUM_SAMPLES[rank]) + sum(NUM_SAMPLES[:rank])
    losses = torch.rand(len(ids), generator=torch.Generator().manual_seed(rank)) + rank
    return [{"id": ids[at : at + BATCH], "loss": losses[at : at + BATCH]} for at in range(0, len(ids), BATCH)]


def save(stream: fs.FlowStream, model: dict[str, Any], folder: Path) -> None:
    fs.save_state(stream, folder / "streams", step=model["step"])
    dist.barrier()
    if dist.get_rank() == 0:
        torch.save(model, folder / "model.tmp")
        (folder / "model.tmp").replace(folder / "model.pt")


def train(folder: Path, killed: int) -> None:
    rank, life = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    scorer = fs.FunctionScorer(lambda batch: batch["loss"], name="given")
    temperature = fs.RunningMedian(warmup_samples=32)
    stream = fs.FlowStream(batches_of(rank), scorer, temperature=temperature, window=4, cache=None)
    model = {"step": 0, "sum": 0.0}
    if (folder / "model.pt").exists():
        model = torch.load(folder / "model.pt")
        assert fs.load_state(stream, folder / "streams", step=model["step"]) == model["step"]
    print(f"rank {rank}, life {life}: from step {model['step']}", flush=True)
    with (folder / f"steps-of-{rank}").open("a", buffering=1) as log:
        for batch in stream:
            model["step"] += 1
            model["sum"] += float((batch["flow_weight"] * batch["loss"]).sum())
            ids = batch["id"][batch["flow_weight"] > 0].tolist()
            print(json.dumps({"step": model["step"], "ids": ids}), file=log)
            if life == 0 and rank == killed and model["step"] == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            if model["step"] % SAVE_EVERY == 0:
                save(stream, model, folder)
    save(stream, model, folder)
    print(f"rank {rank}, life {life}: through at step {model['step']}", flush=True)
    stream.close()


dist.init_process_group("gloo")
train(Path(sys.argv[1]), int(sys.argv[2]))
dist.destroy_process_group()
