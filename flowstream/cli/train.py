"""`flowstream train`: fine-tune a causal language model with FLOW, from texts to a checkpoint and a report."""

from __future__ import annotations

from dataclasses import dataclass

from flowstream.finetune.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """Fine-tune a causal language model with FLOW's weights, from texts to a checkpoint and a report.

    Under torchrun (`torchrun --nproc-per-node 2 -m flowstream train …`) each process takes its part of the samples.
    """

    def run(self) -> None:
        from flowstream.finetune.extras import check_installed

        self.check()
        check_installed("accelerate", "matplotlib", *self.packages)
        from flowstream.finetune.run import train

        train(self)
