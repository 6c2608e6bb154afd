"""What rehearsal was asked to do, checked once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, Literal, Protocol, get_args

from torch import Tensor
from torch.utils.data import default_collate

from flowstream.policies import describe
from flowstream.rehearsal.criteria import Criterion, Judge
from flowstream.scoring.base import Scorer
from flowstream.scoring.function import FunctionScorer

Strategy = Literal["mix-cd", "random"]


Question = str | Callable[[Any], Any] | Sequence[Any]
"""What is asked of a sample: a field, a function of it, or the answers, one a sample."""


class Prior(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """Prior samples, mixed into a stream at a fixed share of its compute, most where fine-tuning damages most: mix-cd.

    *Collateral damage* is a sample that the prior model got right and the tuned model gets wrong. The prior data are
    cut into bins D_k; of each, the rate of damage α_k is estimated from the rehearsed samples that training saw anyway,
    and the next ones are drawn from bin k with probability ∝ α_k · |D_k|, uniformly within it, without replacement
    until the bin is through. α_k is the mean of a Beta posterior that forgets: of what was seen `half_life` rehearsed
    samples ago, over all bins and ranks, half counts, so that drift is followed and a bin that nothing is known of any
    more is drawn as at the beginning. It is a rate among all samples of the bin, those that the prior model got wrong
    among them: they cannot be damaged, and lower it. Source: Bai et al. 2025, arXiv 2402.08096; the Beta prior and the
    forgetting are ours.

    Rehearsed samples come in batches of their own, evenly between the loader's: packed rows, images and other sequence
    lengths need not meet in one tensor, the loader's batches stay as they are, and no step needs more memory than
    before. Each batch has `flow_rehearsed`, int64 [B] (packed rows: [B, T]): the prior sample's index, -1 for the
    loader's own. Compute is counted in what a batch makes the model read: rows x padded width for tokens (`input_ids`
    or `attention_mask` tell), rows for all else. A rehearsed batch takes at most what the loader's largest one did so
    far, but for a single sample that is larger, which comes alone; what is left over is carried on, so that the share
    is `ratio` over time. With `accumulate=k` a window gets a multiple of k of them. A BatchNorm in train mode
    normalises each of them by its own statistics.

    Rates first move after the first windows, that of the temperature's warm-up among them: for short runs set `window`
    and `warmup_samples` small. A state has the feedback that was given, agreed upon or not yet, and not that which is
    to come: take it after `stream.feedback`, or the batch in between is never counted.

    >>> rehearsal = Rehearsal(prior, scorer, bins=10, ratio=0.25)  # doctest: +SKIP
    >>> stream = FlowStream(loader, scorer, rehearsal=rehearsal)  # doctest: +SKIP
    >>> for batch in stream:  # doctest: +SKIP
    ...     labels, weight = batch.pop("labels"), batch.pop("flow_weight")
    ...     rehearsed = batch.pop("flow_rehearsed")
    ...     logits = model(**batch).logits
    ...     weighted_lm_loss(logits, labels, weight).backward()
    ...     stream.feedback(rehearsed, logits=logits, labels=labels)

    Args:
        prior: a map-style data set (`len` and `[i]`) of samples.
        scorer: the frozen prior model. It scores the prior data once, at the stream's first `next()`, each rank its
            share; for "random" nothing is scored.
        bins: by the prior model's loss, of equal size (quantiles of a digest); 1 for none. Losses that are equal stay
            together, so there may be fewer.
        ratio: rehearsed share of all compute, in (0, 1).
        label: a field of a sample, a function of it, or a sequence with an entry a sample, that cuts the bins: a
            domain, a language. With `bins` above 1
            each of its values is cut by loss.
        criterion: when a sample is right. "token_accuracy": at least `threshold` of its labelled tokens are the
            likeliest ones; "exact_match": all are; "class": the likeliest class is the label; or a function (logits,
            labels) → [B] bool, which does its own shifting.
        threshold: of "token_accuracy".
        was_correct: whether the prior model got a sample right, given as `label` is. By default its model is asked,
            once, as the training loop asks the tuned one; a `FunctionScorer` has none, so that feedback to it gives
            `correct`, or logits with the criterion "class" or a function.
        collate_fn: samples → a batch with the fields of the loader's. It may pack: a document a sample, in order.
        strategy: "mix-cd", or "random": uniform over the prior data, which needs no feedback.
        half_life: in rehearsed samples over all ranks; `None`: nothing is forgotten.
        prior_counts: (a, b) of the Beta prior of every bin, in samples: damaged and not. Above 0, so that no bin
            freezes.
        weight: `flow_weight` of rehearsed samples. 1 is a sample of plain fine-tuning; FLOW's own have mean .4, unless
            `normalize=True`.
        batch_size: samples that the prior model is asked for at a time.
        cache: "memory": what the prior model said is kept in this object; or a path: a folder of its own that keeps it
            for later runs with the same model, criterion and data (of which 64 samples are compared).
        seed: of the draws.

    Raises:
        ValueError: arguments that cannot be, at once; samples that cannot, at the stream's first `next()`.
    """

    prior: Prior
    scorer: Scorer
    _: KW_ONLY
    bins: int = 10
    ratio: float = 0.25
    label: Question | None = None
    criterion: Criterion | Callable[[Tensor, Tensor], Tensor] = "token_accuracy"
    threshold: float = 0.5
    was_correct: Question | None = None
    collate_fn: Callable[[list[Any]], Any] = default_collate
    strategy: Strategy = "mix-cd"
    half_life: float | None = 2000.0
    prior_counts: tuple[float, float] = (1.0, 1.0)
    weight: float = 1.0
    batch_size: int = 8
    cache: Literal["memory"] | str | os.PathLike[str] = "memory"
    seed: int = 0
    measured: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What the prior model said, once it was asked."""

    def __post_init__(self) -> None:
        if not (hasattr(self.prior, "__len__") and hasattr(self.prior, "__getitem__")):
            raise ValueError(f"prior is a {type(self.prior).__name__}: give a map-style data set, with len() and [i]")
        if not len(self.prior):
            raise ValueError("prior is empty: there is nothing to rehearse")
        if not isinstance(self.bins, int) or isinstance(self.bins, bool) or not 1 <= self.bins <= len(self.prior):
            raise ValueError(
                f"bins is {self.bins!r}: give a whole number from 1 to the {len(self.prior)} prior samples"
            )
        if not callable(self.collate_fn):
            raise ValueError(f"collate_fn is {self.collate_fn!r:.80}: give a function, samples → a batch")
        for name in ("ratio", "threshold", "half_life", "weight"):
            given = getattr(self, name)
            if not isinstance(given, Real | None if name == "half_life" else Real):
                raise ValueError(f"{name} is {given!r:.80}: give a number")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio!r}: give the rehearsed share of all compute, between 0 and 1")
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy is {self.strategy!r}: choose 'mix-cd' or 'random'")
        if not callable(self.criterion) and self.criterion not in get_args(Criterion):
            raise ValueError(
                f"criterion is {self.criterion!r}: choose {', '.join(map(repr, get_args(Criterion)))} or a function "
                "(logits, labels) → [B] bool"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}: give a share of a sample's tokens, above 0")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life is {self.half_life!r}: give a number of samples above 0, or None")
        counts = self.prior_counts if hasattr(self.prior_counts, "__len__") else ()
        if len(counts) != 2 or not all(isinstance(count, Real) and 0 < count < math.inf for count in counts):
            raise ValueError(f"prior_counts is {self.prior_counts!r}: give two numbers above 0, or bins would freeze")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight is {self.weight!r}: give a finite weight of at least 0")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}: give a whole number of at least 1")
        for name in ("label", "was_correct"):
            given = getattr(self, name)
            is_sequence = given is not None and not isinstance(given, str) and not callable(given)
            if is_sequence and not (hasattr(given, "__getitem__") and len(given) == len(self.prior)):
                raise ValueError(
                    f"{name} is a {type(given).__name__} beside {len(self.prior)} prior samples: give a field of a "
                    "sample, a function of it, or a sequence with an entry a sample"
                )
        if self.strategy == "mix-cd":
            self._check_scorer()

    def _check_scorer(self) -> None:
        kind = type(self.scorer).__name__
        if "sample" not in getattr(self.scorer, "levels", ()):
            raise ValueError(f"scorer is a {kind}: give the frozen prior model, such as CausalLMScorer(model)")
        if self.was_correct is None and self.reference is None:
            raise ValueError(
                f"a {kind} has no model to ask what it got right: give was_correct=, a field of the samples or a "
                "function of one"
            )
        if self.cache != "memory" and isinstance(self.scorer, FunctionScorer):
            raise ValueError(f"nothing tells one {kind} from another in a later run: leave cache at 'memory'")

    @property
    def reference(self) -> Any:
        """The frozen model that the scorer has, or `None`."""
        return getattr(self.scorer, "_reference", None)

    @property
    def reads_tokens(self) -> bool:
        """Whether the criterion must know at which position a label is predicted."""
        return self.criterion in ("token_accuracy", "exact_match")

    @property
    def judge(self) -> Judge:
        """The criterion, as it is for the model of the scorer."""
        is_decoder = self.reference is not None and "decoder_input_ids" in self.reference.accepted
        return Judge(self.criterion, self.threshold, shifts=not is_decoder)

    def __str__(self) -> str:
        """In words that are equal in every process: what ranks, and a state, must agree with."""
        told: dict[str, Any] = {
            "strategy": self.strategy,
            "ratio": self.ratio,
            "num_prior": len(self.prior),
            "weight": self.weight,
            "seed": self.seed,
        }
        if self.strategy == "mix-cd":
            told |= {
                "bins": self.bins,
                "half_life": self.half_life,
                "prior_counts": tuple(self.prior_counts),
                "measure": self.measure,
            }
        return f"Rehearsal({', '.join(f'{name}={value}' for name, value in told.items())})"

    @property
    def measure(self) -> str:
        """What the prior model is asked, in words."""
        named = [_named(value) for value in (self.criterion, self.label, self.was_correct)]
        return f"{named[0]} at {self.threshold:g}, label {named[1]}, was_correct {named[2]}"


def _named(value: Any) -> str:
    if value is None or isinstance(value, str):
        return str(value)
    if callable(value):
        return describe(value)
    told = repr([_plain(entry) for entry in value])
    return f"given ({hashlib.blake2b(told.encode(), digest_size=8).hexdigest()})"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
