"""Several ranks over shards of unequal size: equally many batches, every sample once, one τ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from spawned import run_ranks
from uneven import BATCH, WINDOW, delivered, ids_of, labels_of, losses_of, own_rank, shard

import flowstream as fs

SIZES = {2: [8 * 40 + 3, 50], 4: [300, 0, 41, 130], 8: [64, 0, 333, 8, 120, 1, 90, 240]}


def walked(cases: list[tuple[list[int], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What one rank's streams deliver over its shard, one stream after the other."""
    return [delivered(shard(own_rank(), sizes[own_rank()]), **settings) for sizes, settings in cases]


def found_by_case(world_size: int, cases: list[tuple[list[int], dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Of each case, what each rank has found."""
    outcomes = run_ranks(walked, world_size, cases)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    return list(zip(*(outcome.result for outcome in outcomes), strict=True))


def num_batches(num: int) -> int:
    return -(-num // BATCH)


def check_every_sample_once(sizes: list[int], found: list[dict[str, Any]], epoch: int) -> None:
    """As many batches on all ranks, each sample in one of them, and the rest without weight or label."""
    longest = max(map(num_batches, sizes))
    for rank, one in enumerate(found):
        batches = one["epochs"][epoch]
        assert len(batches) == one["length"] == longest
        own, padded = batches[: num_batches(sizes[rank])], batches[num_batches(sizes[rank]) :]
        assert [i for batch in own for i in batch["ids"]] == ids_of(rank, sizes[rank])
        assert [i for batch in own for i in batch["labels"]] == labels_of(sizes[rank]).tolist()
        for batch in padded:
            assert batch["weight"] == [0.0] * len(batch["ids"])
            assert set(batch["labels"]) == {-100}


def check_one_tau(found: list[dict[str, Any]]) -> None:
    taus = [[batch["tau"] for epoch in one["epochs"] for batch in epoch] for one in found]
    assert all(taus_of_rank == taus[0] for taus_of_rank in taus)


def windows_of(sizes: list[int], warmup: int, num_deliveries: int) -> list[tuple[int, int]]:
    """From where to where each window of an epoch goes, in batches: the first is as long as the warm-up asks."""
    first = max(WINDOW, -(-warmup // sum(min(num, BATCH) for num in sizes)))
    return [(0, first), *((at, at + WINDOW) for at in range(first, num_deliveries, WINDOW))]


def in_window(sizes: list[int], window: tuple[int, int]) -> list[np.ndarray]:
    """Each rank's losses of a window, in float64."""
    start, end = (BATCH * at for at in window)
    return [losses_of(rank, num)[start:end].double().numpy() for rank, num in enumerate(sizes)]


def weighted_median(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The losses next to it: how it lies between them is a matter of definition."""
    order = np.argsort(values)
    running = np.cumsum(weights[order])
    middle = int(np.searchsorted(running, running[-1] / 2))
    return float(values[order][middle - 1]), float(values[order][middle + 1])


def aged(past: list[list[np.ndarray]], half_life: float) -> tuple[float, float]:
    """The median where a loss counts half after `half_life` samples over all ranks, which see them side by side."""
    values, weights, later = [], [], 0.0
    for window in reversed(past):
        for losses in window:
            ages = later + np.arange(len(losses))[::-1] * len(window)
            values.append(losses)
            weights.append(0.5 ** (ages / half_life))
        later += sum(map(len, window))
    return weighted_median(np.concatenate(values), np.concatenate(weights))


def at_ess(losses: np.ndarray, fraction: float) -> float:
    """The τ at which weights have this effective sample size, by bisection."""
    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        weights = np.exp(-losses / middle)
        low, high = (
            (low, middle) if weights.sum() ** 2 / (weights**2).sum() > fraction * len(losses) else (middle, high)
        )
    return low


def check_taus(sizes: list[int], spec: Any, one: dict[str, Any]) -> None:
    """τ of every batch against the losses of all ranks' windows before it; of the first: against its own."""
    past: list[list[np.ndarray]] = []
    for epoch in one["epochs"]:
        windows = windows_of(sizes, getattr(spec, "warmup_samples", 0), len(epoch)) if not past else None
        # A later epoch has no warm-up.
        for start, end in windows or [(at, at + WINDOW) for at in range(0, len(epoch), WINDOW)]:
            own = in_window(sizes, (start, end))
            known = [own] if isinstance(spec, fs.WindowMedian) or not past else past
            union = np.concatenate([losses for window in known for losses in window])
            if isinstance(spec, fs.TargetESS):
                low = high = at_ess(union, spec.fraction)
            elif isinstance(spec, fs.RunningMedian) and spec.half_life_samples:
                low, high = aged(known, spec.half_life_samples)
            else:
                low = high = float(np.median(union))
            for batch in epoch[start:end]:
                assert low * 0.998 <= float.fromhex(batch["tau"]) <= high * 1.002
            past.append(own)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_padded_every_sample_comes_once_and_all_ranks_take_as_many_steps(world_size):
    sizes = SIZES[world_size]
    specs = [fs.RunningMedian(warmup_samples=warmup) for warmup in (16, 100)]
    cases = [(sizes, {"include": ("tau",), "temperature": spec, "num_epochs": 2, "cache": "memory"}) for spec in specs]
    for spec, found in zip(specs, found_by_case(world_size, cases), strict=True):
        for epoch in range(2):
            check_every_sample_once(sizes, found, epoch)
        check_one_tau(found)
        check_taus(sizes, spec, found[0])
        longest = max(map(num_batches, sizes))
        padded = 2 * sum(longest - num_batches(num) for num in sizes)
        for rank, one in enumerate(found):
            assert one["metrics"]["flow/padded_batches"] == padded
            assert one["metrics"]["flow/samples_seen"] == 2 * sum(sizes)
            assert one["metrics"]["flow/samples_emitted"] == 2 * sizes[rank]
            assert sum("of weight 0, to keep ranks" in text for text in one["told"]) == (rank == 0)


SPECS = [
    fs.RunningMedian(warmup_samples=64, half_life_samples=150),
    fs.RunningMedian(warmup_samples=64, half_life_samples=5000),
    fs.WindowMedian(),
    fs.TargetESS(0.7, warmup_samples=64),
]


def test_every_temperature_is_one_over_all_ranks():
    sizes = SIZES[4]
    cases = [(sizes, {"include": ("tau",), "temperature": spec, "num_epochs": 2}) for spec in SPECS]
    for spec, found in zip(SPECS, found_by_case(4, cases), strict=True):
        for epoch in range(2):
            check_every_sample_once(sizes, found, epoch)
        check_one_tau(found)
        check_taus(sizes, spec, found[0])


def test_weights_that_follow_from_no_common_temperature_take_as_many_steps():
    sizes = [8 * 20, 0, 8 * 3, 8]
    settings = [
        {"temperature": fs.FixedTemperature(1.5)},
        {"temperature": fs.BatchMedian()},
        {"policy": fs.Uniform()},
    ]
    for setting, found in zip(settings, found_by_case(4, [(sizes, setting) for setting in settings]), strict=True):
        check_every_sample_once(sizes, found, 0)
        for rank, one in enumerate(found):
            for number, batch in enumerate(one["epochs"][0][: num_batches(sizes[rank])]):
                losses = losses_of(rank, sizes[rank])[number * BATCH :][:BATCH]
                if "policy" in setting:
                    expected = torch.ones(BATCH)
                else:
                    fixed = setting["temperature"]
                    median = np.median(losses.double().numpy())
                    expected = torch.exp(-losses / (fixed.value if isinstance(fixed, fs.FixedTemperature) else median))
                torch.testing.assert_close(torch.tensor(batch["weight"]), expected, rtol=1e-5, atol=0)


def test_normalized_weights_have_mean_one_over_all_ranks_from_the_first_window_on():
    sizes = SIZES[4]
    spec = fs.RunningMedian(warmup_samples=64)
    settings = {"include": ("tau",), "temperature": spec, "normalize": True}
    (found,) = found_by_case(4, [(sizes, settings)])
    check_every_sample_once(sizes, found, 0)
    total, num = 0.0, 0
    for start, end in windows_of(sizes, 64, len(found[0]["epochs"][0])):
        tau = float.fromhex(found[0]["epochs"][0][start]["tau"])
        own = in_window(sizes, (start, end))
        raw = [np.exp(-losses / tau) for losses in own]
        if not num:
            total, num = sum(part.sum() for part in raw), sum(map(len, raw))
        mean = total / num
        for one, weights, size in zip(found, raw, sizes, strict=True):
            ours = [w for batch in one["epochs"][0][start : min(end, num_batches(size))] for w in batch["weight"]]
            np.testing.assert_allclose(ours, weights / mean, rtol=1e-5, atol=1e-30)
        if start:
            total, num = total + sum(part.sum() for part in raw), num + sum(map(len, raw))


# What is delivered, in every form.

FORMS: list[dict[str, Any]] = [
    {"attach": "pair"},
    {"attach": "pair", "include": ("loss", "tau", "index", "denominator")},
    {"include": ("loss", "tau", "index", "denominator"), "accumulate": 2},
]


def forms(sizes: list[int]) -> list[list[dict[str, Any]]]:
    """Tuples in every form of `attach` and `include`, field by field."""
    loader = [(batch["loss"], batch["labels"]) for batch in shard(own_rank(), sizes[own_rank()])]
    scorer = fs.FunctionScorer(lambda batch: batch[0])
    found = []
    for form in FORMS:
        with fs.FlowStream(loader, scorer, window=WINDOW, cache=None, **form) as stream:
            batches = []
            for batch in stream:
                if form.get("attach") == "pair":
                    (loss, labels), weight, *more = batch
                    extras = more[0] if more else {}
                else:
                    loss, labels, weight, *rest = batch
                    extras = dict(zip([f"flow_{name}" for name in form["include"]], rest, strict=True))
                fields = {"batch_loss": loss, "labels": labels, "weight": weight, **extras}
                batches.append({name: value.tolist() for name, value in fields.items()})
            found.append(batches)
    return found


def test_padded_batches_have_the_form_of_the_others():
    sizes = [8 * 9 + 3, 0, 20]
    outcomes = run_ranks(forms, 3, sizes)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for number, form in enumerate(FORMS):
        found = [outcome.result[number] for outcome in outcomes]
        assert [len(batches) for batches in found] == [10, 10, 10]
        for rank, batches in enumerate(found):
            own = num_batches(sizes[rank])
            losses = [loss for batch in batches[:own] for loss in batch["batch_loss"]]
            assert losses == losses_of(rank, sizes[rank]).tolist()
            for batch in batches:
                assert batch.keys() == found[0][0].keys()
                assert len(batch["weight"]) == len(batch["labels"])
            for batch in batches[own:]:
                assert set(batch["weight"]) == {0.0}
            if "include" in form:
                assert [i for batch in batches[:own] for i in batch["flow_index"]] == list(range(sizes[rank]))
                assert [loss for batch in batches[:own] for loss in batch["flow_loss"]] == losses
                for batch in batches[own:]:
                    assert set(batch["flow_index"]) == {-1}
                    assert set(batch["flow_loss"]) == {0.0}
                for step, batch in enumerate(batches):
                    assert batch["flow_tau"] == found[0][step]["flow_tau"]
                    assert batch["flow_denominator"] == found[0][step]["flow_denominator"] > 0
