"""What scoring costs beside training on one GPU: a Llama of 1.2 B in bf16, batches of 16 rows of at most 1,024 tokens.

The model has random weights, the rows log-normal lengths; it is trained with fused AdamW, without gradient
checkpointing. Plain training, the stream's first epoch (all is scored, on the same GPU) and its second (all is cached)
take turns over the same batches. Prints

- what an epoch with scoring takes over plain training, against 1 + FLOPs of scoring / FLOPs of training: products of 2
  FLOPs a parameter and token, three times that in training, and attention;
- padded tokens a real one; peak memory; how long `next()` waited after the first window, in shares of the epoch;
- the share of the GPU's peak rate that scoring alone reaches;
- how often `next()` waits for the GPU within a window and at its boundary, by torch's warnings.

    python benchmarks/gpu_overlap.py [--batches 64] [--rounds 3] [--peak 989e12] [--quick]
    python benchmarks/gpu_overlap.py --device cpu --tiny    # that the script itself works
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flowstream as fs

BATCH = 16
WINDOW = 16
MAX_LENGTH = 1024

Batch = dict[str, Tensor]


def config_of(tiny: bool) -> LlamaConfig:
    """Of Llama 3.2 1B; or of something that any machine trains in seconds."""
    hidden, layers, heads, shared, inner, vocabulary = (
        (64, 2, 4, 2, 128, 512) if tiny else (2048, 16, 32, 8, 8192, 128_256)
    )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def batches_of(num_batches: int, tiny: bool, pinned: bool) -> list[Batch]:
    """Padded batches on the host: of each row the first two fifths, on average, are a prompt without labels."""
    generator = np.random.default_rng(0)
    longest, typical, vocabulary = (64, 24, 512) if tiny else (MAX_LENGTH, 350, 128_256)
    made = []
    for _ in range(num_batches):
        lengths = np.clip(generator.lognormal(np.log(typical), 0.6, BATCH), 8, longest).astype(int)
        prompts = (lengths * generator.uniform(0.2, 0.6, BATCH)).astype(int)
        column, width = np.arange(lengths.max()), lengths.max()
        mask = column < lengths[:, None]
        ids = np.where(mask, generator.integers(2, vocabulary, (BATCH, width)), 0)
        labels = np.where(mask & (column >= prompts[:, None]), ids, -100)
        arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        made.append({name: tensor.pin_memory() for name, tensor in batch.items()} if pinned else batch)
    return made


@dataclass(frozen=True)
class Flops:
    """Of an epoch. A product is 2 a parameter and token."""

    training: float
    """Forward and backward over padded tokens, the head over all of them."""

    scoring: float
    """Forward over tokens, the head over labelled ones."""

    attention: float
    """The share of attention in `training`, whose kernels are taken to skip nothing under a mask of padding."""

    @classmethod
    def of(cls, model: LlamaForCausalLM, batches: Sequence[Batch]) -> Flops:
        config = model.config
        head = config.vocab_size * config.hidden_size
        body = sum(p.numel() for p in model.model.layers.parameters())
        # Scores and values: two products of 2 · T² · D a head, and half of it where a causal kernel skips the rest.
        pair = 4 * config.num_hidden_layers * config.hidden_size
        num_padded = sum(batch["input_ids"].numel() for batch in batches)
        num_labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
        squares = sum(BATCH * batch["input_ids"].shape[1] ** 2 for batch in batches)
        # Flash kernels take the scores again in the backward pass: 5 products after the forward's 2.
        attended = 3.5 * pair * squares
        training = 6.0 * (body + head) * num_padded + attended
        scoring = 2 * body * float(lengths.sum()) + 2 * head * num_labelled + pair * float(lengths.square().sum()) / 2
        return cls(training, scoring, attended / training)


class Training:
    """Owns the model under training, its optimizer, and the device that both are on."""

    def __init__(self, model: LlamaForCausalLM, device: torch.device) -> None:
        self.model = model.train()
        self.device = device
        # No learning rate: weights must not run away while the same batches come again and again.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")

    def step(self, batch: Batch, weight: Tensor) -> None:
        sent = {name: batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "attention_mask")}
        fs.weighted_lm_loss(self.model(**sent).logits, batch["labels"], weight).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Epoch:
    seconds: float
    peak_bytes: int
    waited: float
    """Seconds that `next()` waited after the first batch, on the host."""


def plainly(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches with weights of 1."""
    for batch in batches:
        yield {**batch, "flow_weight": torch.ones(BATCH)}


def run_epoch(training: Training, batches: Iterable[Batch], stream: fs.FlowStream | None) -> Epoch:
    on_gpu = training.device.type == "cuda"
    training.synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(training.device)
    started, waited_before = time.perf_counter(), None
    for batch in batches:
        if stream is not None and waited_before is None:  # the first window is waited for by design
            waited_before = stream.metrics()["flow/wait_seconds"]
        weight = batch.pop("flow_weight")
        training.step(batch, weight)
    training.synchronize()
    seconds = time.perf_counter() - started
    waited = stream.metrics()["flow/wait_seconds"] - (waited_before or 0.0) if stream is not None else 0.0
    return Epoch(seconds, torch.cuda.max_memory_allocated(training.device) if on_gpu else 0, waited)


def seconds_of_scoring(scorer: fs.Scorer, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    """(with, without) reading and planning on the host: each window by itself, after training has come to rest."""
    reading, running = 0.0, 0.0
    for at in range(0, len(batches), WINDOW):
        started = time.perf_counter()
        job = scorer.begin(batches[at : at + WINDOW], level="sample")
        reading += time.perf_counter() - started
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            job.finish()  # waits for the losses
            end.record()
            end.synchronize()
            running += begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            job.finish()
            running += time.perf_counter() - started
    return reading + running, running


def print_waits(training: Training, stream: fs.FlowStream, num_batches: int) -> None:
    """How often `next()` makes the host wait for the GPU. Events, which a boundary waits on, are not warned of."""
    within, at_boundaries, num_boundaries, where = 0, 0, 0, set()
    iterator = iter(stream)
    last = stream.metrics()["flow/samples_seen"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("warn")
    try:
        for number in range(num_batches):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                batch = next(iterator)
            seen = stream.metrics()["flow/samples_seen"]
            crossed, last = seen != last, seen
            found = [warning for warning in caught if "synchroniz" in str(warning.message)]
            if number:  # before the first batch comes the first window
                num_boundaries += crossed
                at_boundaries += len(found) * crossed
                within += len(found) * (not crossed)
                where |= {f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in found}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the training step are its own
                weight = batch.pop("flow_weight")
                training.step(batch, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(
        f"synchronisations in next(), besides waits for events: {within} within windows (must be 0), {at_boundaries} "
        f"at {num_boundaries} boundaries{': ' + ', '.join(sorted(where)) if where else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=64, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, default=989e12, help="dense bf16 FLOP/s of the GPU (an H200's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and rows that any machine trains in seconds")
    parser.add_argument("--quick", action="store_true", help="48 batches, one round")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_overlap needs a GPU, and there is none (--device cpu --tiny tries the script out)")
        return
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("on a CPU only --tiny ends within the hour")
    if arguments.quick:
        arguments.batches, arguments.rounds = 3 * WINDOW, 1

    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the products of a tiny model are too small to share
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logging.getLogger("flowstream").setLevel(logging.ERROR)  # losses of random weights are alike, and it tells
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config_of(arguments.tiny)).to(dtype)
    batches = batches_of(arguments.batches, arguments.tiny, pinned=device.type == "cuda")
    training = Training(model, device)
    scorer = fs.CausalLMScorer(copy.deepcopy(model).requires_grad_(False).eval(), copy=False)

    def new_stream() -> fs.FlowStream:
        # A first window of one, not of the 1,024 samples that τ would like: the rest shall be scored beside training.
        temperature = fs.RunningMedian(warmup_samples=BATCH * WINDOW)
        return fs.FlowStream(batches, scorer, window=WINDOW, temperature=temperature)

    flops = Flops.of(model, batches)
    num_real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    num_padded = sum(batch["input_ids"].numel() for batch in batches)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, to try the script out"
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters on {name}; {len(batches)} batches of "
        f"{BATCH} rows, {num_real / len(batches) / BATCH:.0f} tokens a row, {num_padded / num_real:.2f} padded tokens "
        "a real one in training"
    )
    # The allocator keeps what the first epoch of each kind asked for.
    warm = new_stream()
    for _ in range(2):
        run_epoch(training, warm, warm)
    run_epoch(training, plainly(batches), None)

    found: dict[str, list[Epoch]] = {"plain": [], "epoch 1": [], "epoch 2": []}
    padding = 0.0
    for number in range(arguments.rounds):
        stream = new_stream()
        found["plain"].append(run_epoch(training, plainly(batches), None))
        found["epoch 1"].append(run_epoch(training, stream, stream))
        padding = stream.metrics()["flow/padding_fraction"]
        found["epoch 2"].append(run_epoch(training, stream, stream))
        told = ", ".join(f"{name} {epochs[-1].seconds:.2f} s" for name, epochs in found.items())
        print(f"  round {number}: {told}", flush=True)

    predicted = 1 + flops.scoring / flops.training
    for name, expected in (("epoch 1", predicted), ("epoch 2", 1.0)):
        pairs = zip(found[name], found["plain"], strict=True)
        ratio = statistics.median(ours.seconds / plain.seconds for ours, plain in pairs)
        waited = statistics.median(epoch.waited / epoch.seconds for epoch in found[name])
        print(
            f"{name} over plain training: {ratio:.3f}, {ratio / expected:.3f} of what FLOPs predict ({expected:.3f}); "
            f"next() waited {waited:.2%} of the time"
        )
    print(
        f"padded tokens a real one in scoring: {1 / (1 - padding):.3f}; attention is {flops.attention:.1%} of the "
        f"training's FLOPs, which run at {_share(flops.training, found['plain'], arguments.peak)} of the peak rate"
    )
    with_reading, running = seconds_of_scoring(scorer, batches, device)
    print(
        f"scoring alone: {flops.scoring / running / 1e12:.3g} TFLOP/s, {flops.scoring / running / arguments.peak:.1%} "
        f"of the peak rate; {running / with_reading:.0%} of its time is not reading and planning"
    )
    if device.type == "cuda":
        peaks = {name: max(epoch.peak_bytes for epoch in epochs) / 2**30 for name, epochs in found.items()}
        told = ", ".join(f"{name} {peak:.1f} GiB" for name, peak in peaks.items())
        print(f"peak memory, with both models in it: {told}")
        print_waits(training, new_stream(), min(len(batches), 3 * WINDOW))
    else:
        print("peak memory and synchronisations are a GPU's")


def _share(flops: float, epochs: Sequence[Epoch], peak: float) -> str:
    return f"{flops / min(epoch.seconds for epoch in epochs) / peak:.1%}"


if __name__ == "__main__":
    main()
