"""What a user sees of a training: a bar in a terminal, a line every few steps elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_ON_THE_BAR = ("loss", "flow/tau", "flow/mean_weight", "flow/acceptance")
"""A bar has half of the width."""
_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "flow/tau": "τ {:.4f}",
    "flow/mean_weight": "mean weight {:.2f}",
    "flow/acceptance": "accepted {:.0%}",
    "flow/ess": "ESS {:.0%}",
}


class ProgressLines(TrainerCallback):
    """Writes to the terminal through rich, on the first rank only.

    Use it as a context manager around the training: a bar is taken down also where training raises.

    Args:
        is_weighted: the loss is weighted, and nothing is accepted or rejected.
    """

    def __init__(self, *, is_weighted: bool, console: Console | None = None) -> None:
        hidden = "flow/acceptance" if is_weighted else "flow/mean_weight"
        self._shown = {name: how for name, how in _SHOWN.items() if name != hidden}
        if is_weighted:
            self._shown["loss"] = "weighted loss {:.4f}"
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)
        control.should_log |= state.global_step >= state.max_steps  # where a run ended is told, whatever --log-steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if self._bar is not None and "loss" in logs:
            self._bar.update(self._bar.task_ids[0], description=self._told(logs, _ON_THE_BAR))
        elif text := self._told(logs, _SHOWN) if "loss" in logs else _losses(logs):
            self._console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False, soft_wrap=True)

    def _told(self, logs: dict[str, float], names: Iterable[str]) -> str:
        return "  ".join(self._shown[name].format(logs[name]) for name in names if name in self._shown and name in logs)


def _losses(logs: dict[str, float]) -> str:
    """Of the evaluation sets."""
    named = [
        (name.removeprefix("eval_").removesuffix("_loss"), value) for name, value in logs.items() if _is_of_set(name)
    ]
    return "  ".join(f"{name} {value:.4f}" for name, value in named)


def _is_of_set(name: str) -> bool:
    return name.startswith("eval_") and name.endswith("_loss")
