"""The trainer of `flowstream train`: transformers' own with FLOW, our loader, losses by token, and a log of the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from flowstream.finetune.encoding import IGNORED
from flowstream.finetune.evaluation import token_loss
from flowstream.finetune.evaluation_sets import EvaluationSet
from flowstream.finetune.tokens import text_of
from flowstream.integrations.transformers import FlowTrainerMixin
from flowstream.report.run_log import Evaluation, RunLog, StepPoint


class _WithLoader(Trainer):
    """A trainer that is given its loader."""

    def __init__(self, *args: Any, loader: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loader = loader

    def get_train_dataloader(self) -> Any:
        return self._loader


class FinetuningTrainer(FlowTrainerMixin, _WithLoader):
    """Owns the log of the run, which its checkpoints keep.

    Args:
        loader: this rank's batches.
        run_log: to be filled.
        evaluation_sets: evaluated in the place of what a `Trainer` would, each by `token_loss`.
    """

    def __init__(self, *args: Any, run_log: RunLog, evaluation_sets: Sequence[EvaluationSet], **kwargs: Any) -> None:
        self.run_log = run_log
        self._evaluation_sets = tuple(evaluation_sets)
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A step, whose samples are noted."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        rows = (labels[:, 1:] != IGNORED).any(dim=1).nonzero().flatten().tolist()  # not those of a padded batch

        def texts(row: int) -> tuple[str, str]:
            return text_of(ids[rows[row]], labels[rows[row]] != IGNORED, self.processing_class)

        self.run_log.add_samples(
            _by_sample(inputs["flow_loss"], labels)[rows].tolist(),
            _by_sample(inputs["flow_weight"], labels)[rows].tolist(),
            [xxhash.xxh3_64_hexdigest(ids[row].numpy().tobytes())[:8] for row in rows],
            texts,
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss of each set, in nats a token, logged as `eval_NAME_loss`."""
        assert self.model is not None
        losses = {
            each.name: token_loss(
                self.model,
                each.dataset,
                self.data_collator,
                batch_size=self.args.eval_batch_size,
                device=self.args.device,
                autocast=self.accelerator.autocast,
            )
            for each in self._evaluation_sets
        }
        metrics = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        self.log(dict(metrics))
        self.run_log.evaluations.append(Evaluation(step=self.state.global_step, losses=losses))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, and a row of the log of the run."""
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            step = self.state.global_step
            named = {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
            self.run_log.steps.append(StepPoint(step=step, loss=logs["loss"], **named))
            if self.flow_stream is not None:
                self.run_log.add_window(step, self.flow_stream.metrics())

    def go_to_end(self, checkpoint: Path) -> None:
        """Take up a run that was through, but had not written what it learned."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_log(str(checkpoint))

    # A checkpoint is whole once the trainer's own state is there, which is written last, by rank 0.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        _log_path(Path(output_dir), self.args.process_index).write_text(self.run_log.to_json(), "utf-8")
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_log(checkpoint)

    def _load_log(self, checkpoint: str) -> None:
        if (before := log_of(Path(checkpoint), self.args.process_index)) is not None:
            now, self.run_log = self.run_log, before
            before.settings, before.versions = now.settings, now.versions


def log_of(checkpoint: Path, rank: int = 0) -> RunLog | None:
    """What the run had noted when the checkpoint was written."""
    path = _log_path(checkpoint, rank)
    return RunLog.from_json(path.read_text("utf-8")) if path.exists() else None


def _log_path(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"rank-{rank}-run_log.json"


def _by_sample(values: Tensor, labels: Tensor) -> Tensor:
    """[B], of samples or the means of their labelled tokens."""
    if values.ndim == 1:
        return values
    labelled = labels != IGNORED
    labelled[:, 0] = False
    return (values * labelled).sum(dim=1) / labelled.sum(dim=1).clamp(min=1)
