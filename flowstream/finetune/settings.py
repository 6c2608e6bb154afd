"""What a fine-tuning run is asked to do: the options of `flowstream train`, and those that all commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from flowstream.finetune.encoding import Encoder

# What the help shows of an option that may be left out: "{None}|INT … (default: None)" tells nobody anything.
_MaybeCount = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_MaybeNumber = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
_MaybeName = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]

_ON_THE_WAY = ("eval", "eval_steps", "save_steps", "log_steps", "tensorboard", "resume", "dry_run")
_MAY_CHANGE = frozenset({"out", "cache", "merge", "gradient_checkpointing", *_ON_THE_WAY})
"""Settings that a run may be resumed with otherwise: what is learned is the same."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How records become tokens."""

    prompt_column: str = "prompt"
    """Column of the prompt, on which nothing is learned."""
    response_column: str = "response"
    """Column of the response."""
    messages_column: str = "messages"
    """Column of a conversation, which goes through the tokenizer's chat template; its assistant turns are learned."""
    separator: str = ""
    """Text between prompt and response, as part of the prompt; \\n is a line break."""
    as_chat: bool = False
    """Put prompt and response into the tokenizer's chat template, as one turn each."""
    max_length: int = 1024
    """Tokens that a sample may have."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What happens to a sample that has more."""
    split: str = "train"
    """Split of a data set hf:NAME, where @SPLIT does not say."""

    def encoder(self, tokenizer: Any) -> Encoder:
        """What makes tokens of a record."""
        from flowstream.finetune.encoding import Columns, Encoder

        columns = Columns(prompt=self.prompt_column, response=self.response_column, messages=self.messages_column)
        return Encoder(
            tokenizer=tokenizer,
            columns=columns,
            max_length=self.max_length,
            overlong=self.overlong,
            as_chat=self.as_chat,
            separator=self.separator.replace(r"\n", "\n"),
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run. `check()` says what cannot be."""

    model: str
    """Name or path of the pre-trained model and its tokenizer."""
    data: str
    """Texts to learn: file.jsonl, tar shards as 'shards/{000000..000099}.tar', or hf:NAME."""
    out: Path
    """Folder of the fine-tuned checkpoint, of report.html, and of checkpoints on the way."""
    texts: tyro.conf.OmitArgPrefixes[Texts] = field(default_factory=Texts)

    # FLOW
    mode: Literal["weight", "resample"] = "weight"
    """Weight each sample's loss by e^{-f/τ}, or keep each sample with that probability."""
    level: Literal["sample", "token"] = "sample"
    """Weigh samples, or each token by its own loss."""
    reference: _MaybeName = None
    """Name or path of the frozen model that scores; by default the model itself, as it is before training."""
    quantile: float = 0.5
    """τ is this quantile of the losses; the paper's is the median."""
    target_ess: _MaybeNumber = None
    """Choose τ so that the effective sample size is this share of the samples, in place of a quantile."""
    normalize: bool = False
    """Divide weights by their running mean, so that steps keep their size."""
    cache: str = "memory"
    """Where the reference's losses are kept: memory, none, or a folder on a local disk, for later runs, too."""

    # Training
    epochs: float = 1.0
    """Passes over the data; of resampled data, the steps that a pass is expected to give."""
    max_steps: _MaybeCount = None
    """Optimizer steps, in place of epochs. Shards, whose number of samples is not known, need it."""
    batch_size: int = 8
    """Samples of a micro-batch, on each process."""
    accumulate: int = 1
    """Micro-batches of an optimizer step."""
    lr: _MaybeNumber = None
    """Highest learning rate of the cosine schedule; by default 1e-5, with LoRA 2e-4."""
    warmup: float = 0.03
    """Share of the steps over which it rises."""
    weight_decay: float = 0.0
    """Of AdamW."""
    label_smoothing: float = 0.0
    """In training; the reference scores without."""
    lora_rank: _MaybeCount = None
    """Train adapters of this rank on all linear layers, with the base as reference; by default all parameters."""
    lora_alpha: _MaybeCount = None
    """Scale of the adapters; by default their rank."""
    merge: bool = True
    """Merge the adapters into the checkpoint that is written; else it holds the adapters alone."""
    bf16: bool = False
    """Compute in bfloat16; trained parameters stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass, for memory."""
    shuffle: int = 1000
    """Samples of the buffer in which streamed shards are shuffled."""
    workers: int = 0
    """Processes that read streamed shards."""
    seed: int = 0
    """Of the order, of the adapters, and of what is drawn."""

    # On the way
    eval: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Evaluation set as NAME=FILE; of a .txt all text counts. The first is the target, others measure retention."""
    eval_steps: _MaybeCount = None
    """Steps between evaluations; by default a tenth of the training."""
    save_steps: _MaybeCount = None
    """Steps between checkpoints; by default a tenth of the training."""
    log_steps: int = 10
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard's files into the folder."""
    resume: bool = False
    """Go on from the last checkpoint in the folder, if there is one."""
    dry_run: bool = False
    """Only show the plan: steps, memory, and the expected cost of scoring."""

    def check(self) -> None:
        """`ValueError` for what cannot be."""
        counts = ("batch_size", "accumulate", "log_steps", "max_steps", "eval_steps", "save_steps", "lora_rank")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} is {value}: give 1 or more")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{_flag(name)} is {value}: give a number above 0")
        for name in ("weight_decay", "shuffle", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: give 0 or more")
        for name in ("quantile", "target_ess"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{_flag(name)} is {value}: give a share between 0 and 1")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: give a share from 0, below 1")
        if self.target_ess is not None and self.quantile != 0.5:
            raise ValueError("--quantile and --target-ess both choose τ: give one of them")
        if self.mode == "resample" and self.level == "token":
            raise ValueError("--mode resample takes whole samples: use --level sample, or --mode weight")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("--lora-alpha scales adapters, and there are none: give --lora-rank, too")
        if self.lora_rank is not None and self.reference is not None:
            raise ValueError("with --lora-rank the model's own base is the reference: leave out --reference")

    def asked(self) -> dict[str, str]:
        """Name → value of each setting that has one, as a report lists them."""
        values = asdict(self)
        values |= values.pop("texts")
        return {name: str(value) for name, value in values.items() if value not in (None, (), "")}

    def check_resumes(self, before: Mapping[str, str], place: str) -> None:
        """`ValueError` that names what a run was begun with otherwise; `before` is what was asked then."""
        now = self.asked()
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if told := [
            f"{_flag(name)} was {before.get(name, 'not given')}, and now it is {now.get(name, 'not given')}"
            for name in differing
            if name not in _MAY_CHANGE
        ]:
            raise ValueError(f"{place} is of another run: {'; '.join(told)}. Leave it as it was, or give another --out")

    @property
    def packages(self) -> tuple[str, ...]:
        """Those that it needs, and others do not."""
        return ("tensorboard",) * self.tensorboard + ("peft",) * (self.lora_rank is not None)

    @property
    def learning_rate(self) -> float:
        """As given, or what suits full or adapter training."""
        return self.lr or (1e-5 if self.lora_rank is None else 2e-4)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
