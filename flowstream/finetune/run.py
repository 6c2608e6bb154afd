"""One fine-tuning run: plan, train with FLOW, evaluate, write the checkpoint and the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from flowstream.digest import Digest
from flowstream.distributed.rank_error import RankError
from flowstream.finetune.arguments import arguments_of, flow_of
from flowstream.finetune.checkpoints import last_checkpoint, num_ranks, step_of
from flowstream.finetune.collate import Collate
from flowstream.finetune.evaluation_sets import EvaluationSet, read_evaluation_sets
from flowstream.finetune.loading import Material
from flowstream.finetune.paths import make_folder
from flowstream.finetune.plan import Plan, plan_of
from flowstream.finetune.pretrained import check_fits, empty_models, load_model, load_tokenizer
from flowstream.finetune.progress import ProgressLines
from flowstream.finetune.quiet import quiet
from flowstream.finetune.settings import Settings
from flowstream.finetune.trainer import FinetuningTrainer, log_of
from flowstream.report.run_log import RunLog
from flowstream.report.training import write_report
from flowstream.scoring.out_of_memory import is_out_of_memory


def train(settings: Settings) -> None:
    """Run it.

    Raises:
        ValueError, OSError: what the user can mend, in one line.
    """
    settings.check()
    with quiet(), _tensorboard_in(settings.out / "tensorboard"), _told_in_a_line(settings):
        _train(settings)


def _train(settings: Settings) -> None:
    started = time.perf_counter()
    is_first = int(os.environ.get("RANK", "0")) == 0
    console = Console(quiet=not is_first, highlight=False)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = _checkpoint(settings, world_size)
    tokenizer = load_tokenizer(settings.model)
    encoder = settings.texts.encoder(tokenizer)
    material = Material.of(settings.data, encoder, split=settings.texts.split)
    evaluation_sets = read_evaluation_sets(settings.eval, encoder)
    models = empty_models(settings)
    read = [(settings.data, material.dataset), *((each.name, each.dataset) for each in evaluation_sets)]
    for spec, samples in read:
        if samples is not None:
            check_fits(settings.model, models[0].config, tokenizer, samples, spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_of(settings, material, *models, device, world_size)
    _show(console, plan)
    if checkpoint is not None:
        console.print(f"resumes after step {step_of(checkpoint)}, from {checkpoint.name}")
    if settings.dry_run:
        return
    make_folder("--out", settings.out)
    if settings.cache not in ("memory", "none"):
        make_folder("--cache", Path(settings.cache))
    # The arguments join the processes of torchrun: the loader takes its part of the data after them.
    arguments = arguments_of(settings, plan, has_sets=bool(evaluation_sets), is_resumed=checkpoint is not None)
    set_seed(settings.seed)  # of new adapters
    lines = ProgressLines(is_weighted=settings.mode == "weight")
    trainer = FinetuningTrainer(
        load_model(settings),
        arguments,
        loader=material.loader(
            encoder,
            batch_size=settings.batch_size,
            seed=settings.seed,
            shuffle=settings.shuffle,
            num_workers=settings.workers,
        ),
        data_collator=Collate.of(tokenizer),
        eval_dataset={each.name: each.dataset for each in evaluation_sets} or None,
        processing_class=tokenizer,
        callbacks=[lines],
        flow=flow_of(settings, arguments.device),
        run_log=_log(settings, evaluation_sets),
        evaluation_sets=evaluation_sets,
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None and step_of(checkpoint) >= plan.num_steps:
        trainer.go_to_end(checkpoint)
    else:
        with lines:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _check_steps(trainer, plan, console)
    evaluated = trainer.run_log.evaluations
    if evaluation_sets and (not evaluated or evaluated[-1].step < trainer.state.global_step):
        trainer.evaluate()
    write_checkpoint(trainer, settings)
    log = _merged(trainer.run_log)
    log.seconds["this process"] = time.perf_counter() - started
    if trainer.is_world_process_zero():
        write_report(log, settings.out / "report.html")
        console.print(f"checkpoint: {settings.out}\nreport: {settings.out / 'report.html'}")
        if trainer.flow_stream is not None:
            found = trainer.flow_stream.metrics()["flow/cache_hit_rate"]
            console.print(f"of the reference's losses, {found:.0%} were in the cache")
    if trainer.flow_stream is not None:
        trainer.flow_stream.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_steps(trainer: FinetuningTrainer, plan: Plan, console: Console) -> None:
    """`ValueError` where nothing was learned: an epoch of which resampling keeps nothing has no batch."""
    done = trainer.state.global_step
    if done >= plan.num_steps:
        return
    metrics = {} if trainer.flow_stream is None else trainer.flow_stream.metrics()
    why = (
        f"an epoch had no batch left: resampling keeps a sample with its weight, whose mean is "
        f"{metrics.get('flow/mean_weight', math.nan):.2g} at τ = {metrics.get('flow/tau', math.nan):.4g} nats. Take a "
        "larger τ (--quantile, or --target-ess nearer 1), or --mode weight"
    )
    if not done:
        raise ValueError(f"no step was done, {why}")
    console.print(f"only {done} of {plan.num_steps} steps were done: {why}", soft_wrap=True)


def write_checkpoint(trainer: FinetuningTrainer, settings: Settings) -> None:
    """What `from_pretrained` loads: the model and its tokenizer; of adapters the merged model, and they beside it."""
    if settings.lora_rank is None or not settings.merge:
        trainer.save_model(str(settings.out))
        return
    if trainer.is_world_process_zero():
        adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer: Any = trainer.processing_class
        adapted.save_pretrained(settings.out / "adapter")
        adapted.merge_and_unload().save_pretrained(settings.out)
        tokenizer.save_pretrained(settings.out)
    trainer.accelerator.wait_for_everyone()


def _checkpoint(settings: Settings, world_size: int) -> Path | None:
    """The checkpoint to go on from. `ValueError` where a run would write over another's."""
    found = last_checkpoint(settings.out)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"--out {settings.out} is a file: give a folder")
    for flag, name in (("--model", settings.model), ("--reference", settings.reference)):
        if name is not None and settings.out.is_dir() and Path(name).is_dir() and settings.out.samefile(name):
            raise ValueError(f"--out {settings.out} is the folder of {flag}, which would be written over: give another")
    if found is not None and not settings.resume and not settings.dry_run:
        raise ValueError(
            f"{settings.out} has {found.name} of a run: go on from it with --resume, or give another --out"
        )
    if found is None or not settings.resume:
        return None
    if (log := log_of(found)) is not None:
        settings.check_resumes(log.settings, f"{found.name} in {settings.out}")
    if (num := num_ranks(found)) != world_size:
        raise ValueError(
            f"{found.name} in {settings.out} was written by {num} processes, and now there are {world_size}: start as "
            f"many as then (torchrun --nproc-per-node), or give another --out"
        )
    return found


def _log(settings: Settings, evaluation_sets: tuple[EvaluationSet, ...]) -> RunLog:
    return RunLog(
        mode=settings.mode,
        target=evaluation_sets[0].name if evaluation_sets else None,
        settings=settings.asked(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flowstream": importlib.metadata.version("flowstream"),
        },
    )


def _merged(log: RunLog) -> RunLog:
    """The log of the first rank, with the samples of all."""
    if not dist.is_initialized():
        return log
    logs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(logs, log.to_json())
    others = [RunLog.from_json(text) for text in logs]
    for other in others[1:]:
        others[0].extremes.merge(other.extremes)
    others[0].losses = Digest.merged([other.losses for other in others])
    return others[0]


def _show(console: Console, plan: Plan) -> None:
    rows = plan.rows()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:<{width}}  {value}", soft_wrap=True)


@contextlib.contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Where transformers has TensorBoard write, unless the user says where."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _told_in_a_line(settings: Settings) -> Iterator[None]:
    """What a user can mend, but what is no `ValueError`: a full device, and another rank's end."""
    try:
        yield
    except RankError as error:
        raise ValueError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = [f"lower --batch-size {settings.batch_size}", f"lower --max-length {settings.texts.max_length}"]
        ways += [] if settings.gradient_checkpointing else ["add --gradient-checkpointing"]
        ways += [] if settings.lora_rank else ["add --lora-rank 16"]
        raise ValueError(f"out of memory, {str(error).splitlines()[0]}: {', or '.join(ways)}") from error
