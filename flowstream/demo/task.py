"""What every seed starts from: a checkpoint, fine-tuning shards, and what to measure on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from flowstream.demo.evaluation import EvaluationSplit
from flowstream.demo.problems import Problem
from flowstream.demo.settings import Settings
from flowstream.demo.shards import Encoder, open_shards


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that the seeds share, in plain values: tensors do not travel between processes as lightly."""

    settings: Settings
    checkpoint: Path
    shards: tuple[Path, ...]
    problems: tuple[Problem, ...]
    """The fine-tuning set; a problem's number is its place."""
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    validation_text: list[list[int]]
    """Chunks of held-out text, as tokens."""
    test_text: list[list[int]]

    def encoder(self) -> Encoder:
        """The checkpoint's tokenizer."""
        return Encoder(AutoTokenizer.from_pretrained(self.checkpoint))

    def model(self) -> LlamaForCausalLM:
        """A fresh copy of the checkpoint."""
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(self.checkpoint)
        return model

    def loader(self, encoder: Encoder, seed: int) -> Iterable[dict[str, Tensor]]:
        """The fine-tuning set in the order of a seed."""
        return open_shards(self.shards, encoder, batch=self.settings.batch, seed=seed)

    def splits(self, encoder: Encoder) -> dict[str, EvaluationSplit]:
        """What to measure on."""
        return {
            "validation": EvaluationSplit(self.validation, self.validation_text, encoder),
            "test": EvaluationSplit(self.test, self.test_text, encoder),
        }
