"""Seeds side by side: one process each, with its share of the cores. Small models gain little from a second thread."""

import contextlib
import logging
import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

import torch
import transformers

from flowstream.demo.experiment import Report, SeedOutcome, run_seed
from flowstream.demo.task import Task

_POLL_SECONDS = 0.2


def run_seeds(task: Task, seeds: Sequence[int], report: Report) -> list[SeedOutcome]:
    """`run_seed` for every seed, in the seeds' order. What a worker raises is raised here."""
    num_workers = min(len(seeds), num_cores(), task.settings.max_processes)
    if num_workers == 1:
        return [run_seed(task, seed, report) for seed in seeds]
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with ProcessPoolExecutor(
        num_workers, context, _start_worker, (messages, max(1, num_cores() // num_workers))
    ) as pool:
        outcomes = [pool.submit(_run, task, seed) for seed in seeds]
        while wait(outcomes, timeout=0).not_done or not messages.empty():
            with contextlib.suppress(queue.Empty):
                report(messages.get(timeout=_POLL_SECONDS))
        return [outcome.result() for outcome in outcomes]


_messages: Any = None
"""In a worker: where to report to."""


def _start_worker(messages: Any, num_threads: int) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(num_threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("flowstream").setLevel(logging.ERROR)


def _run(task: Task, seed: int) -> SeedOutcome:
    return run_seed(task, seed, _messages.put)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
