"""`flowstream demo`: pre-train, fine-tune six ways, and report what was retained at equal target. No network."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Pre-train a small Llama on the standard library, fine-tune it on word problems by six methods, report retention.

    Writes report.html, results.json, the checkpoint and the tar shards. Needs no network; five minutes on two cores.
    """

    out: Path = Path("demo")
    """Folder to write to."""
    seeds: int = 2
    """Number of paired repetitions: orders of the fine-tuning set, and draws of the samplers."""
    quick: bool = False
    """A short run of everything, for tests: its numbers mean nothing."""
    steps: int | None = None
    """Fine-tuning steps, instead of the preset's."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of every method, instead of the preset's."""

    def run(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: give at least 1")
        if self.steps is not None and self.steps < 8:
            raise ValueError(f"--steps {self.steps}: give at least 8")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ValueError(f"--learning-rates {self.learning_rates}: give rates above 0")
        if find_spec("matplotlib") is None:
            raise ValueError("the demo draws with matplotlib: pip install 'flowstream[demo]'")
        from flowstream.demo.runner import run
        from flowstream.demo.settings import FULL, QUICK, adapted

        settings = adapted(QUICK if self.quick else FULL, self.steps, self.learning_rates)
        run(settings, range(self.seeds), self.out)
