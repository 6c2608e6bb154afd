"""What FLOW costs in transformers' Trainer and TRL's SFTTrainer: an epoch over one of the plain trainer.

A model of 4 M parameters in fp32 (see gsm8k.py), batches of 16, AdamW. Epochs take turns; the first one of each way is
not counted. Prints the medians of wall and CPU seconds over the rounds, and of their ratios to the plain trainer:

    Trainer, SFTTrainer   as they are
    with FLOW             `FlowTrainer`, `FlowSFTTrainer`: scoring, weights, and the first step's check of the weights
    losses on disk        the same, where a run before has left the losses in a cache

    python benchmarks/trainers.py [--samples 256] [--rounds 3] [--threads 2] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import gsm8k
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from flowstream.integrations.transformers import FlowConfig, FlowTrainer
from flowstream.integrations.trl import FlowSFTTrainer

Epoch = Callable[[], None]


def arguments(kind: type[Any], folder: Path, **further: Any) -> Any:
    return kind(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=gsm8k.BATCH,
        num_train_epochs=1,
        learning_rate=1e-5,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **further,
    )


def trainer_epoch(model: nn.Module, rows: list[gsm8k.Row], folder: Path, flow: FlowConfig | None) -> Epoch:
    options: dict[str, Any] = {
        "args": arguments(TrainingArguments, folder, remove_unused_columns=False),
        "train_dataset": rows,
        "data_collator": gsm8k.collate,
    }
    trained = copy.deepcopy(model)
    trainer = Trainer(trained, **options) if flow is None else FlowTrainer(trained, **options, flow=flow)
    return lambda: trainer.train() and None


def sft_epoch(model: nn.Module, rows: list[gsm8k.Row], folder: Path, flow: FlowConfig | None) -> Epoch:
    ids = [question + answer for question, answer in rows]
    labels = [[-100] * len(question) + answer for question, answer in rows]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")), eos_token="<end>"
    )
    options: dict[str, Any] = {
        "args": arguments(SFTConfig, folder, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        "train_dataset": datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}),
        "processing_class": tokenizer,
    }
    trained = copy.deepcopy(model)
    trainer = SFTTrainer(trained, **options) if flow is None else FlowSFTTrainer(trained, **options, flow=flow)
    return lambda: trainer.train() and None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    num_samples, num_rounds = (32, 1) if asked.quick else (asked.samples, asked.rounds)
    torch.set_num_threads(asked.threads)
    logging.getLogger("flowstream").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of the trainers
    model, rows = gsm8k.model(torch.float32), gsm8k.rows(num_samples)
    print(f"{gsm8k.described()}: {num_samples} samples, {num_rounds} rounds, {asked.threads} threads\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for plain, epoch_of in (("Trainer", trainer_epoch), ("SFTTrainer", sft_epoch)):
            ways = {
                plain: epoch_of(model, rows, folder, None),
                "with FLOW": epoch_of(model, rows, folder, FlowConfig()),
                "losses on disk": epoch_of(model, rows, folder, FlowConfig(cache=folder / plain)),
            }
            tell(measured(ways, num_rounds))


def measured(ways: dict[str, Epoch], num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each epoch; those before the first round fill the cache on disk."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, epoch in ways.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            epoch()
            if number:
                seconds[name].append((time.perf_counter() - started, time.process_time() - started_cpu))
    return seconds


def tell(seconds: dict[str, list[tuple[float, float]]]) -> None:
    plain, *_ = seconds
    for name, epochs in seconds.items():
        wall, cpu = (statistics.median(each) for each in zip(*epochs, strict=True))
        over = [
            statistics.median(one[kind] / other[kind] for one, other in zip(epochs, seconds[plain], strict=True))
            for kind in (0, 1)
        ]
        print(f"{name:16s} {wall:6.1f} s, CPU {cpu:6.1f} s   over {plain}: {over[0]:.3f}, CPU {over[1]:.3f}")
    print()


if __name__ == "__main__":
    main()
