"""Seeds side by side: one process each, with its share of the cores. Small models gain little from a second thread."""

import contextlib
import logging
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch
import transformers

_POLL_SECONDS = 0.2

Report = Callable[[str], None]
"""Told of every run that is done."""

_Outcome = TypeVar("_Outcome")
_Task = TypeVar("_Task")


def run_side_by_side(
    run_seed: Callable[[_Task, int, Report], _Outcome],
    task: _Task,
    seeds: Sequence[int],
    report: Report,
    *,
    max_processes: int,
) -> list[_Outcome]:
    """`run_seed(task, seed, report)` for every seed, in the seeds' order. What a worker raises is raised here.

    `run_seed` is a function of a module, and the task is picklable: workers import and receive them.
    """
    num_workers = min(len(seeds), num_cores(), max_processes)
    if num_workers == 1:
        return [run_seed(task, seed, report) for seed in seeds]
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with ProcessPoolExecutor(
        num_workers, context, _start_worker, (messages, max(1, num_cores() // num_workers))
    ) as pool:
        outcomes = [pool.submit(_run, run_seed, task, seed) for seed in seeds]
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
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("flowstream").setLevel(logging.ERROR)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would train on, unseen."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _run(run_seed: Callable[[_Task, int, Report], _Outcome], task: _Task, seed: int) -> _Outcome:
    return run_seed(task, seed, _messages.put)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
