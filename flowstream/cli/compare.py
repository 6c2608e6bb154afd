"""`flowstream compare`: methods of fine-tuning side by side, by what they retain at equal target."""

from __future__ import annotations

from dataclasses import dataclass

from flowstream.compare.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Fine-tune by many methods on one grid, choose on validation, report on test what each retains at equal target.

    The baseline is the curve that standard fine-tuning draws. Finished cells are kept: the same command goes on.
    """

    def run(self) -> None:
        from flowstream.finetune.extras import check_installed

        self.check()
        check_installed("matplotlib", *self.packages)
        from flowstream.compare.runner import compare

        compare(self)
