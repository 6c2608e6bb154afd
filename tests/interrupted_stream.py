"""Real SIGINTs to this process, wherever it is, over and over: what is delivered from state to state. Prints JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from batches import batches_of, gamma_losses

import flowstream as fs

BATCHES = batches_of(gamma_losses(16 * 60))


class Interrupter:
    """Sends this process a SIGINT at every `every`-th visit, until it has sent `num`."""

    def __init__(self, every: int, num: int) -> None:
        self.every, self.left, self.visits = every, num, 0

    def visit(self) -> None:
        self.visits += 1
        if self.left and self.visits % self.every == 0:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # it comes while this is still under way
                pass


class Loader:
    def __init__(self, interrupter: Interrupter | None) -> None:
        self.interrupter = interrupter

    def __iter__(self) -> Iterator[Any]:
        for batch in BATCHES:
            if self.interrupter is not None:
                self.interrupter.visit()
            yield batch


def stream_of(mode: str, place: str, interrupter: Interrupter) -> fs.FlowStream:
    def score(batch: Any) -> torch.Tensor:
        if place == "scoring":
            interrupter.visit()
        if place == "anywhere":
            time.sleep(1e-3)
        loss: torch.Tensor = batch["loss"]
        return loss

    def policy(loss: torch.Tensor, tau: Any) -> torch.Tensor:
        if place == "weighing":
            interrupter.visit()
        return torch.exp(-loss / tau)

    def collate(rows: list[Any]) -> Any:
        if place == "delivering":
            interrupter.visit()
        return torch.utils.data.default_collate(rows)

    return fs.FlowStream(
        Loader(interrupter if place == "pulling" else None),
        fs.FunctionScorer(score, name="score"),
        mode=mode,  # type: ignore[arg-type]
        window=3,
        temperature=fs.RunningMedian(warmup_samples=48),
        policy=policy,
        recollate=collate,
        include=("tau", "loss"),
        cache=None,
    )


def delivered(
    mode: str, place: str, interrupter: Interrupter, draws: random.Random | None = None, goes_on: bool = False
) -> tuple[Any, int]:
    """What one epoch delivers, over as many resumes as it is interrupted; and how often it was.

    `goes_on`: the same iterator is asked again, in place of a new stream.
    """
    seen: list[Any] = []
    stream = stream_of(mode, place, interrupter)
    iterator = iter(stream)
    num_interrupts = 0
    while True:
        is_over = False
        try:
            if draws is not None and num_interrupts < 40:
                delay = draws.uniform(0, 0.01)
                threading.Thread(target=interrupt_after, args=(delay,), daemon=True).start()
            for batch in iterator:
                seen.append(batch)
            is_over = True
            time.sleep(0.03 if draws is not None else 0)  # for a signal that is under way
        except KeyboardInterrupt:
            num_interrupts += 1
        if is_over:
            return [(b["id"].tolist(), b["flow_tau"].item(), b["flow_loss"].tolist()) for b in seen], num_interrupts
        if not goes_on:
            state = stream.state_dict()
            stream = stream_of(mode, place, interrupter)
            stream.load_state_dict(state)
            iterator = iter(stream)


def interrupt_after(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found: dict[str, Any] = {}
    for mode in ("weight", "resample"):
        expected, _ = delivered(mode, "nowhere", Interrupter(1, 0))
        found[mode] = {}
        for place in ("pulling", "scoring", "weighing", "delivering", "anywhere"):
            if (mode, place) == ("weight", "delivering"):
                continue  # runs no code of the user's
            interrupter = Interrupter({"weighing": 5, "delivering": 3}.get(place, 11), 5)
            draws = random.Random(0) if place == "anywhere" else None
            ours, num_interrupts = delivered(mode, place, interrupter, draws)
            found[mode][place] = (ours == expected, num_interrupts)
            interrupter = Interrupter(interrupter.every, 5)
            ours, num_interrupts = delivered(mode, place, interrupter, draws, goes_on=True)
            found[mode][f"{place}, the same iterator"] = (ours == expected, num_interrupts)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
