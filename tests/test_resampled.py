"""The stream in resample mode: what it draws, how rows meet, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batches import batches_of, by_key, gamma_losses, gathered
from torch.utils.data import default_collate
from transformers import BatchEncoding

import flowstream as fs


def drawn(losses: torch.Tensor, seed: int = 0, mode="resample", batch_size: int = 8, **arguments) -> torch.Tensor:
    """The ids that a stream over these losses delivers."""
    arguments = {"window": 4, "temperature": fs.FixedTemperature(1.0)} | arguments
    stream = fs.FlowStream(batches_of(losses, batch_size), by_key, mode=mode, seed=seed, cache=None, **arguments)
    out = list(stream)
    return gathered(out, "id") if out else torch.empty(0, dtype=torch.int64)


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many standard errors the mean over seeds is from what is expected; [statistics]."""
    return (samples.mean(axis=0) - expected) / (samples.std(axis=0, ddof=1) / np.sqrt(len(samples)))


def test_thin_is_unbiased_on_a_stream_sorted_by_difficulty():
    losses = torch.linspace(0.05, 3.0, 600)
    weight = torch.exp(-losses).double().numpy()
    position = np.linspace(0, 1, 600)
    statistics = np.stack([np.ones(600), position > 0.5, losses.numpy(), position**2, np.cos(9 * position)])
    found = []
    for seed in range(100):
        ids = drawn(losses, seed).numpy()
        found.append(statistics[:, ids].sum(axis=1))
    z = z_scores(np.array(found), statistics @ weight)
    assert np.abs(z).max() < 4, z


@pytest.mark.soak
def test_thin_is_unbiased_with_a_running_tau_given_the_taus_it_used():
    losses = torch.cat([gamma_losses(300), 2 * gamma_losses(300, seed=1)])
    differences = []
    for seed in range(150):
        stream = fs.FlowStream(
            batches_of(losses, 8),
            by_key,
            mode="resample",
            seed=seed,
            window=4,
            temperature=fs.RunningMedian(warmup_samples=64),
            cache=None,
            include=("weight",),
        )
        out = list(stream)
        # Every candidate's weight is known only to the stream; those of kept rows have Σ 1/w = number of candidates.
        differences.append([len(losses) - float((1 / gathered(out, "flow_weight").double()).sum())])
    assert np.abs(z_scores(np.array(differences), np.zeros(1))).max() < 4


def test_systematic_gives_the_hard_half_of_a_sorted_stream_half_of_the_mass():
    losses = torch.distributions.HalfNormal(1.0).icdf(torch.linspace(0.001, 0.999, 4096))
    tau = fs.FixedTemperature(float(losses.median()))
    shares = {}
    for name, mode in {"thin": fs.Thin(), "systematic": fs.Systematic(2.0)}.items():
        ids = torch.cat([drawn(losses, seed, mode, temperature=tau) for seed in range(5)])
        shares[name] = float((ids >= 2048).double().mean())
    weight = torch.exp(-losses / losses.median())
    exact = float(weight[2048:].sum() / weight.sum())
    assert exact == pytest.approx(0.22, abs=0.01)
    assert shares["thin"] == pytest.approx(exact, abs=0.01)
    assert shares["systematic"] == pytest.approx(0.50, abs=0.02)
    assert "22 %" in (fs.Systematic.__doc__ or "")


def test_thin_repeats_no_sample_and_a_larger_scale_takes_more():
    losses = gamma_losses(4000)
    half, one, three = (drawn(losses, mode=fs.Thin(scale)) for scale in (0.5, 1.0, 3.0))
    for ids in (half, one):
        assert len(ids.unique()) == len(ids)
    assert len(half) == pytest.approx(len(one) / 2, rel=0.05)
    assert len(three) == pytest.approx(3 * len(one), rel=0.05)
    assert len(three.unique()) < len(three)


def test_a_draw_is_a_pure_function_of_seed_epoch_and_losses():
    losses = gamma_losses(1000)
    assert torch.equal(drawn(losses, seed=1), drawn(losses, seed=1))
    assert not torch.equal(drawn(losses, seed=1), drawn(losses, seed=2))
    stream = fs.FlowStream(batches_of(losses), by_key, mode="resample", temperature=fs.FixedTemperature(1.0))
    first, second = gathered(list(stream), "id"), gathered(list(stream), "id")
    assert not torch.equal(first, second)
    again = fs.FlowStream(batches_of(losses), by_key, mode="resample", temperature=fs.FixedTemperature(1.0))
    again.set_epoch(1)
    assert torch.equal(gathered(list(again), "id"), second)


def test_batches_are_as_large_as_the_loaders_and_every_field_stays_with_its_sample():
    losses = gamma_losses(1000)
    stream = fs.FlowStream(
        batches_of(losses, 12), by_key, mode="resample", include=("loss", "weight", "index", "tau", "denominator")
    )
    out = list(stream)
    assert [len(batch["id"]) for batch in out[:-1]] == [12] * (len(out) - 1)
    for batch in out:
        ids = batch["id"]
        assert batch["name"] == [f"sample {i}" for i in ids.tolist()]
        assert torch.equal(batch["loss"], losses[ids])
        assert torch.equal(batch["flow_loss"], losses[ids])
        assert torch.equal(batch["flow_index"], ids)
        assert float(batch["flow_denominator"]) == len(ids)
        torch.testing.assert_close(batch["flow_weight"], torch.exp(-losses[ids] / batch["flow_tau"]))
    metrics = stream.metrics()
    delivered = gathered(out, "id")
    assert metrics["flow/samples_seen"] == 1000
    assert metrics["flow/samples_emitted"] == len(delivered)
    assert metrics["flow/acceptance"] == len(delivered) / 1000


def test_a_batch_in_resample_mode_gains_nothing():
    (first, *_) = fs.FlowStream(batches_of(gamma_losses(400)), by_key, mode="resample")
    assert first.keys() == {"loss", "id", "name"}


def padded_batches(side: str, num: int = 30):
    """Rows of 3 to 20 tokens, their number each, padded to their batch's longest with 90, which occurs inside too."""
    generator = torch.Generator().manual_seed(0)
    batches, at = [], 0
    for _ in range(num):
        lengths = torch.randint(3, 21, (6,), generator=generator).tolist()
        width = max(lengths)
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        for i, length in enumerate(lengths):
            ids = [at + i] * (length - 1) + [90]
            pad = width - length
            for key, values, fill in (
                ("input_ids", ids, 90),
                ("attention_mask", [1] * length, 0),
                ("labels", [-100, *ids[1:]], -100),
            ):
                rows[key].append(values + [fill] * pad if side == "right" else [fill] * pad + values)
        batch = {key: torch.tensor(value) for key, value in rows.items()}
        batch["loss"] = torch.rand(6, generator=generator)
        batch["name"] = [f"{at + i}:{length}" for i, length in enumerate(lengths)]
        batches.append(BatchEncoding(batch))
        at += 6
    return batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_widths_meet_correctly(side):
    batches = padded_batches(side)
    out = list(fs.FlowStream(batches, by_key, mode="resample", window=4))
    assert len(out) > 10
    largest = max(batch["input_ids"].numel() for batch in batches)
    for batch in out:
        assert type(batch) is BatchEncoding
        assert batch["input_ids"].numel() <= largest
        for name, ids, mask, labels in zip(
            batch["name"], batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            number, length = map(int, name.split(":"))
            kept = ids[mask.bool()]
            assert mask.sum() == length
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
            assert kept.tolist() == [number] * (length - 1) + [90]
            assert (ids[~mask.bool()] == 90).all()
            assert labels[mask.bool()].tolist() == [-100, *kept[1:].tolist()]
            assert (labels[~mask.bool()] == -100).all()
    padding = sum(int((b["attention_mask"] == 0).sum()) for b in out) / sum(b["input_ids"].numel() for b in out)
    before = sum(int((b["attention_mask"] == 0).sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)
    assert padding < before + 0.05  # no more than the loader's own
    order = [int(name.split(":")[0]) for batch in out for name in batch["name"]]
    assert order == sorted(order)  # in the loader's order


def test_a_collate_function_of_the_users_own_gets_samples():
    def collate(samples):
        assert {type(sample["name"]) for sample in samples} == {str}
        return default_collate(samples) | {"collated": True}

    out = list(fs.FlowStream(batches_of(gamma_losses(400)), by_key, mode="resample", recollate=collate))
    assert all(batch["collated"] for batch in out)
    assert gathered(out, "id").tolist() == [int(name.split()[1]) for batch in out for name in batch["name"]]


def test_patches_that_are_not_rows_raise_naming_the_key():
    batch = {"input_ids": torch.ones(4, 5).long(), "pixel_values": torch.zeros(49, 8), "loss": torch.ones(4)}
    with pytest.raises(ValueError, match=r"batch\['pixel_values'\] has shape \[49, 8\] in a batch of 4 rows"):
        list(fs.FlowStream([batch] * 20, by_key, mode="resample"))


def test_packed_rows_are_refused_with_the_remedy(tiny):
    packed = {
        "input_ids": torch.ones(1, 12).long(),
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
    }
    with pytest.raises(ValueError, match="packed rows.*Resample before packing, or use mode='weight'"):
        list(fs.FlowStream([packed] * 4, fs.CausalLMScorer(tiny("llama")), mode="resample"))


def test_a_small_stream_delivers_what_it_draws():
    assert len(drawn(torch.zeros(5))) == 5
    assert len(drawn(torch.empty(0))) == 0
    assert len(drawn(torch.full((100,), 200.0))) == 0  # all weights are 0
    ids = drawn(torch.full((100,), 1e-9), mode=fs.Systematic(4.0))
    assert len(ids) == 25 * 1


def test_a_window_without_mass_ends_and_the_next_goes_on():
    losses = torch.cat([torch.full((16 * 300,), 300.0), torch.zeros(64)])
    stream = fs.FlowStream(
        batches_of(losses), by_key, mode="resample", window=2, temperature=fs.FixedTemperature(1.0), include=("index",)
    )
    ids = gathered(list(stream), "flow_index")
    assert ids.tolist() == list(range(16 * 300, 16 * 300 + 64))
    all_bad = fs.FlowStream(batches_of(torch.full((16 * 300,), float("nan"))), by_key, mode="resample", window=2)
    with pytest.raises(ValueError, match="are NaN or infinite|have a loss that is NaN"):
        list(all_bad)
    assert all_bad.metrics()["flow/samples_seen"] < 16 * 300


def test_acceptance_at_the_median_is_the_mean_weight():
    losses = gamma_losses(20_000)
    stream = fs.FlowStream(batches_of(losses), by_key, mode="resample")
    list(stream)
    expected = float(torch.exp(-losses / losses.median()).mean())
    assert stream.metrics()["flow/acceptance"] == pytest.approx(expected, abs=0.01)
