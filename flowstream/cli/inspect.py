"""`flowstream inspect FILE --model …`: a data set's losses under a model, and what FLOW's weights would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from flowstream.finetune.settings import Texts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from flowstream.finetune.collate import Collate
    from flowstream.finetune.tokens import TokenDataset
    from flowstream.inspection import Inspection
    from flowstream.report.extremes import SampleNote
    from flowstream.scoring.base import Scorer


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the losses of a data set under a model, and FLOW's weights at several τ: a table, a plot, samples.

    Prints a table and the easiest and hardest samples, and writes the same with the plot as one page of HTML.
    """

    data: tyro.conf.Positional[str]
    """Texts to look at: file.jsonl, tar shards as 'shards/{000000..000099}.tar', or hf:NAME."""
    model: str
    """Name or path of the frozen model and its tokenizer."""
    texts: tyro.conf.OmitArgPrefixes[Texts] = field(default_factory=Texts)
    limit: int = 1000
    """Look at the first so many samples; 0: at all."""
    batch_size: int = 16
    """Samples a batch."""
    cache: Path | None = None
    """Folder on a local disk that keeps the losses, for later runs and for `flowstream train --cache`."""
    device: str = "auto"
    """Where the model computes; auto: on a GPU where there is one."""
    bf16: bool = False
    """As `flowstream train` will compute."""
    num_shown: int = 5
    """Easiest and hardest samples to show, of each so many."""
    out: Path = Path("inspect.html")
    """The page to write."""

    def run(self) -> None:
        for name, least in (("limit", 0), ("batch_size", 1), ("num_shown", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least {least}")
        if not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no folder {self.out.parent}")
        from flowstream.report.svg import check_matplotlib

        check_matplotlib()
        device = _device(self.device)
        from flowstream.finetune.collate import Collate
        from flowstream.finetune.pretrained import load_scorer, load_tokenizer
        from flowstream.finetune.quiet import quiet
        from flowstream.finetune.tokens import read_tokens
        from flowstream.inspection import inspect_losses
        from flowstream.report.inspection import write_page

        tokenizer = load_tokenizer(self.model)
        encoder = self.texts.encoder(tokenizer)
        samples = read_tokens(self.data, encoder, split=self.texts.split, limit=self.limit or None)
        with quiet():
            scorer = load_scorer(self.model, bf16=self.bf16, device=device)
        inspection = inspect_losses(self._losses(samples, scorer, Collate.of(tokenizer)))

        def notes(positions: list[int]) -> list[SampleNote]:
            return _notes(inspection, samples, tokenizer, positions)

        easiest, hardest = notes(inspection.easiest(self.num_shown)), notes(inspection.hardest(self.num_shown))
        title = f"{self.data} under {self.model}"
        settings = asdict(self)
        settings |= settings.pop("texts")
        write_page(inspection, self.out, title=title, easiest=easiest, hardest=hardest, settings=settings)
        _show(inspection, easiest, hardest, title=title)
        if self.limit and len(samples) + samples.num_dropped >= self.limit:
            print(f"these are the first {self.limit:,} samples: --limit takes more of them, 0 all")
        print(f"wrote {self.out}")

    def _losses(self, samples: TokenDataset, scorer: Scorer, collate: Collate) -> NDArray[np.float64]:
        """The losses `[n]` that a stream gives the samples, in their order."""
        import numpy as np
        from rich.console import Console
        from rich.progress import track
        from torch.utils.data import DataLoader

        from flowstream.stream import FlowStream
        from flowstream.temperature import FixedTemperature

        loader = DataLoader(samples, batch_size=self.batch_size, collate_fn=collate)
        losses = np.full(len(samples), np.nan)
        console = Console(stderr=True)
        with FlowStream(
            loader,
            scorer,
            # Only the losses are asked for. At this τ the stream has no advice of its own to give.
            temperature=FixedTemperature(1e-6),
            include=("loss", "index"),
            cache=self.cache,
            max_bad_fraction=1.0,
        ) as stream:
            for batch in track(stream, "scoring", len(loader), console=console, disable=not console.is_terminal):
                losses[batch["flow_index"].numpy()] = batch["flow_loss"].double().numpy()
        return losses


def _device(name: str) -> torch.device:
    """A device that is there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {first}; give cpu, cuda or cuda:1, or leave it out") from None


def _notes(inspection: Inspection, samples: TokenDataset, tokenizer: Any, positions: Sequence[int]) -> list[SampleNote]:
    """The samples at these positions, decoded, with their weight at the median."""
    from flowstream.report.extremes import SampleNote

    weights = inspection.weights(inspection.median)
    notes = []
    for position in positions:
        prompt, response = samples.text(position, tokenizer)
        loss, weight = float(inspection.losses[position]), float(weights[position])
        place = f"sample {position + 1:,}"
        notes.append(SampleNote(place=place, loss=loss, weight=weight, prompt=prompt, response=response))
    return notes


def _show(inspection: Inspection, easiest: Sequence[SampleNote], hardest: Sequence[SampleNote], *, title: str) -> None:
    """The table and the samples, in the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flowstream.report.inspection import HEAD, rows, summary

    console = Console(highlight=False)
    table = Table(box=SIMPLE, padding=(0, 0), pad_edge=False)
    for k, name in enumerate(HEAD):
        table.add_column(name, justify="right" if k else "left")
    for row in rows(inspection.tilts):
        table.add_row(*row)
    print(f"{title}: {summary(inspection)}")
    console.print(table)
    for message in inspection.advice:
        print(message)
    for name, notes in (("easiest", easiest), ("hardest", hardest)):
        if notes:
            console.print(f"\n{name}", style="bold")
        for note in notes:
            texts = Text(f"{note.loss:7.3f}  weight {note.weight:.3f}  {note.place}: ")
            texts.append(_one_line(note.prompt), style="dim")
            texts.append(f" → {_one_line(note.response)}")
            console.print(texts, soft_wrap=True)


def _one_line(text: str, max_chars: int = 160) -> str:
    words = " ".join(text.split())
    return words if len(words) <= max_chars else words[: max_chars - 1] + "…"
