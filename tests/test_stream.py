"""The stream in weight mode: its weights, its order, its iteration, its metrics."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections import UserDict, namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from batches import Recording, batches_of, by_key, gamma_losses, gathered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import flowstream as fs


def language_batches(num_batches: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Right-padded rows of 4 to 20 tokens, a prompt of 2 without labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        lengths = torch.randint(4, 21, (4,), generator=generator)
        width = int(lengths.max())
        ids = torch.randint(3, 97, (4, width), generator=generator)
        mask = torch.arange(width) < lengths[:, None]
        labels = torch.where(mask & (torch.arange(width) >= 2), ids, -100)
        batches.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels})
    return batches


def losses_alone(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Every sample by itself, unpadded: the mean loss over its labelled tokens, in fp64."""
    found = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            with torch.no_grad():
                logits = model(input_ids=ids[None, :length]).logits[0, :-1].double()
            found.append(F.cross_entropy(logits, labels[1:length]))
    return torch.stack(found)


# -- weights ---------------------------------------------------------------------------------------


def test_weights_equal_a_hand_written_offline_flow_of_two_passes(tiny):
    model, batches = tiny("llama"), language_batches()
    losses = losses_alone(model, batches)
    median = float(losses.median())
    temperature = fs.FixedTemperature(median)
    stream = fs.FlowStream(batches, fs.CausalLMScorer(model), temperature=temperature)
    expected = torch.exp(-losses / median)
    torch.testing.assert_close(gathered(list(stream), "flow_weight"), expected.float(), rtol=0, atol=1e-6)


def test_tau_is_the_running_median_of_the_windows_before_and_the_first_windows_own():
    losses = gamma_losses(4000)
    stream = fs.FlowStream(batches_of(losses), by_key, window=16, include=("tau", "loss"))
    tau = torch.stack([batch["flow_tau"] for batch in stream]).double()
    first = 1024  # samples of the warm-up
    for number, value in enumerate(tau.tolist()):
        before = max(first, first + (number * 16 - first) // 256 * 256)
        assert value == pytest.approx(np.median(losses[:before].numpy()), rel=2e-3)


def test_weights_are_the_exponential_of_the_delivered_loss_and_tau():
    batches = list(fs.FlowStream(batches_of(gamma_losses(3000)), by_key, include=("tau", "loss")))
    for batch in batches:
        expected = np.exp(-batch["flow_loss"].double().numpy() / float(batch["flow_tau"]))
        np.testing.assert_allclose(batch["flow_weight"].numpy(), expected, rtol=0, atol=1e-6)


@given(
    batch_size=st.integers(1, 40),
    window=st.one_of(st.just("auto"), st.integers(1, 12)),
    num=st.integers(0, 400),
    warmup=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_every_sample_comes_exactly_once_in_the_loaders_order(batch_size, window, num, warmup):
    loader = batches_of(gamma_losses(num), batch_size) if num else []
    temperature = fs.RunningMedian(warmup_samples=warmup)
    out = list(fs.FlowStream(loader, by_key, window=window, temperature=temperature, include=("index",)))
    assert len(out) == len(loader)
    for got, given_batch in zip(out, loader, strict=True):
        assert got["name"] == given_batch["name"]
        assert torch.equal(got["id"], given_batch["id"])
        assert torch.equal(got["flow_index"], given_batch["id"])
        assert got["flow_weight"].shape == given_batch["loss"].shape


def test_token_weights_have_the_labels_shape_and_are_zero_where_ignored(tiny):
    model, batches = tiny("llama"), language_batches()
    stream = fs.FlowStream(batches, fs.CausalLMScorer(model), level="token", include=("loss", "tau"))
    for batch in stream:
        scored = F.pad(batch["labels"][:, 1:] != -100, (1, 0))
        assert batch["flow_weight"].shape == batch["labels"].shape
        assert torch.equal(batch["flow_weight"] > 0, scored)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        expected = torch.exp(-F.pad(nll, (1, 0)) / batch["flow_tau"]) * scored
        torch.testing.assert_close(batch["flow_weight"], expected, rtol=0, atol=2e-3)  # losses are kept in fp16


def test_packed_rows_give_each_document_its_own_weight(tiny):
    model = tiny("llama")
    documents = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 7, 4)]
    packed = {
        "input_ids": torch.stack([torch.cat(documents[:2]), torch.cat([*documents[2:], documents[3][:3]])]),
        "position_ids": torch.stack(
            [
                torch.cat([torch.arange(5), torch.arange(9)]),
                torch.cat([torch.arange(7), torch.arange(4), torch.arange(3)]),
            ]
        ),
    }
    alone = [
        F.cross_entropy(model(input_ids=d[None]).logits[0, :-1], d[1:]).item() for d in [*documents, documents[3][:3]]
    ]
    scorer = fs.CausalLMScorer(model)
    (batch,) = fs.FlowStream([packed], scorer, temperature=fs.FixedTemperature(2.0))
    expected = torch.tensor([np.exp(-loss / 2.0) for loss in alone], dtype=torch.float32)
    rows = [
        expected[:2].repeat_interleave(torch.tensor([5, 9])),
        expected[2:].repeat_interleave(torch.tensor([7, 4, 3])),
    ]
    torch.testing.assert_close(batch["flow_weight"], torch.stack(rows), rtol=0, atol=1e-5)


def test_normalize_divides_by_the_running_mean_weight():
    losses = gamma_losses(4000)
    plain = list(fs.FlowStream(batches_of(losses), by_key, window=16))
    normal = list(fs.FlowStream(batches_of(losses), by_key, window=16, normalize=True))
    seen = 1024
    mean = gathered(plain[: seen // 16], "flow_weight").double().mean()
    torch.testing.assert_close(normal[0]["flow_weight"], (plain[0]["flow_weight"] / mean).float(), rtol=1e-5, atol=0)
    mean = gathered(plain[: seen // 16 + 16], "flow_weight").double().mean()
    later = seen // 16 + 16
    torch.testing.assert_close(
        normal[later]["flow_weight"], (plain[later]["flow_weight"] / mean).float(), rtol=1e-5, atol=0
    )
    assert gathered(normal, "flow_weight").mean().item() == pytest.approx(1, abs=0.03)


def test_window_median_uses_each_windows_own_losses():
    losses = gamma_losses(960)
    out = list(fs.FlowStream(batches_of(losses), by_key, window=20, temperature=fs.WindowMedian(), include=("tau",)))
    for number, batch in enumerate(out):
        own = losses[number // 20 * 320 :][:320]
        assert float(batch["flow_tau"]) == pytest.approx(np.median(own.numpy()), rel=1e-6)


def test_batch_median_uses_each_batchs_own_losses_and_refuses_batches_below_eight():
    losses = gamma_losses(320)
    out = list(fs.FlowStream(batches_of(losses), by_key, temperature=fs.BatchMedian(), include=("tau",)))
    for batch in out:
        assert float(batch["flow_tau"]) == pytest.approx(np.median(batch["loss"].numpy()), rel=1e-6)
    with pytest.raises(ValueError, match="at least 8 losses, got 4"):
        list(fs.FlowStream(batches_of(losses, 4), by_key, temperature=fs.BatchMedian()))


def test_target_ess_reaches_the_effective_sample_size_asked_for():
    stream = fs.FlowStream(batches_of(gamma_losses(8000)), by_key, temperature=fs.TargetESS(0.5))
    weight = gathered(list(stream), "flow_weight").double()
    assert float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())) == pytest.approx(0.5, abs=0.02)
    assert stream.metrics()["flow/ess"] == pytest.approx(0.5, abs=0.02)


# -- policies --------------------------------------------------------------------------------------


def test_uniform_takes_no_scores():
    def must_not_be_called(batch):
        raise AssertionError("scored")

    stream = fs.FlowStream(batches_of(gamma_losses(100)), fs.FunctionScorer(must_not_be_called), policy=fs.Uniform())
    assert torch.equal(gathered(list(stream), "flow_weight"), torch.ones(100))


def test_permuted_delivers_the_same_weights_to_other_samples():
    losses = gamma_losses(2000)
    flow = gathered(list(fs.FlowStream(batches_of(losses), by_key)), "flow_weight")
    control = list(fs.FlowStream(batches_of(losses), by_key, policy=fs.Permuted(fs.Flow())))
    permuted = gathered(control, "flow_weight")
    assert torch.equal(permuted[:1024].sort().values, flow[:1024].sort().values)
    assert not torch.equal(permuted, flow)
    assert abs(np.corrcoef(permuted.numpy(), losses.numpy())[0, 1]) < 0.1
    other = fs.FlowStream(batches_of(losses), by_key, policy=fs.Permuted(fs.Flow()), seed=1)
    assert not torch.equal(gathered(list(other), "flow_weight"), permuted)


def test_any_callable_is_a_policy_and_a_bad_one_is_told():
    losses = gamma_losses(64)
    stream = fs.FlowStream(
        batches_of(losses), by_key, policy=lambda loss, tau: (loss < tau).float(), temperature=fs.FixedTemperature(1.0)
    )
    assert torch.equal(gathered(list(stream), "flow_weight"), (losses < 1).float())
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        list(fs.FlowStream(batches_of(losses), by_key, policy=lambda loss, tau: -loss))


# -- what is delivered -----------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])
WithField = namedtuple("WithField", ["x", "y", "flow_weight"])


@dataclass
class Item:
    x: torch.Tensor
    y: torch.Tensor
    flow_weight: torch.Tensor | None = None


X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0.5, 1.0, 1.5, 2.0])
WEIGHT = torch.exp(-Y)
FIXED = fs.FixedTemperature(1.0)


@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict])
def test_a_mapping_gains_the_key_and_stays_what_it_was(kind):
    batch = kind({"x": X, "y": Y, "names": ["a", "b", "c", "d"], "array": np.arange(4)})
    scorer = fs.FunctionScorer(lambda batch: batch["y"])
    (out,) = fs.FlowStream([batch], scorer, temperature=FIXED)
    assert type(out) is kind
    assert "flow_weight" not in batch
    assert out["names"] == ["a", "b", "c", "d"]
    assert out["array"] is batch["array"]
    torch.testing.assert_close(out["flow_weight"], WEIGHT)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_sequence_gains_one_more_element(kind):
    scorer = fs.FunctionScorer(lambda batch: batch[1])
    (out,) = fs.FlowStream([kind([X, Y])], scorer, temperature=FIXED, include=("tau",))
    x, y, weight, tau = out
    assert type(out) is kind
    assert x is X
    assert y is Y
    assert tau == 1
    torch.testing.assert_close(weight, WEIGHT)


@pytest.mark.parametrize("batch", [WithField(X, Y, None), Item(X, Y)], ids=["namedtuple", "dataclass"])
def test_a_declared_field_is_filled(batch):
    (out,) = fs.FlowStream([batch], fs.FunctionScorer(lambda batch: batch.y), temperature=FIXED)
    assert type(out) is type(batch)
    assert batch.flow_weight is None
    torch.testing.assert_close(out.flow_weight, WEIGHT)


def test_an_undeclared_field_is_refused_with_the_remedy():
    stream = fs.FlowStream([Pair(X, Y)], fs.FunctionScorer(lambda batch: batch.y), temperature=FIXED)
    with pytest.raises(ValueError, match="Pair declares no field 'flow_weight'.*attach='pair'"):
        next(iter(stream))


def test_a_pair_leaves_the_batch_untouched():
    given_batch = Pair(X, Y)
    stream = fs.FlowStream([given_batch], fs.FunctionScorer(lambda batch: batch.y), temperature=FIXED, attach="pair")
    ((batch, weight),) = stream
    assert batch is given_batch
    torch.testing.assert_close(weight, WEIGHT)
    stream = fs.FlowStream(
        [given_batch], fs.FunctionScorer(lambda b: b.y), temperature=FIXED, attach="pair", include=("loss", "index")
    )
    ((_, _, extras),) = stream
    assert extras.keys() == {"flow_loss", "flow_index"}


def test_include_adds_loss_tau_index_and_denominator():
    batches = batches_of(gamma_losses(200))
    include = ("loss", "tau", "index", "denominator", "weight")
    out = list(fs.FlowStream(batches, by_key, include=include))
    for batch in out:
        assert torch.equal(batch["flow_loss"], batch["loss"])
        assert torch.equal(batch["flow_index"], batch["id"])
        assert batch["flow_tau"].ndim == batch["flow_denominator"].ndim == 0
        assert float(batch["flow_denominator"]) == len(batch["id"])


def test_denominators_make_four_micro_batches_the_gradient_of_one_batch(tiny):
    model = tiny("llama")
    batches = language_batches(16)
    stream = fs.FlowStream(batches, fs.CausalLMScorer(model), accumulate=4, include=("denominator",))
    out = list(stream)
    labelled = [int((batch["labels"][:, 1:] != -100).sum()) for batch in out]
    for first in range(0, 16, 4):
        for batch in out[first : first + 4]:
            assert float(batch["flow_denominator"]) == sum(labelled[first : first + 4])
    for batch in out[:4]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        denominator = batch["flow_denominator"]
        fs.weighted_lm_loss(logits, batch["labels"], batch["flow_weight"], denominator=denominator).backward()
    accumulated = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    width = max(batch["input_ids"].shape[1] for batch in out[:4])

    def joined(key: str, value: int) -> torch.Tensor:
        return torch.cat([F.pad(b[key], (0, width - b[key].shape[1]), value=value) for b in out[:4]])

    logits = model(input_ids=joined("input_ids", 0), attention_mask=joined("attention_mask", 0)).logits
    weight = torch.cat([batch["flow_weight"] for batch in out[:4]])
    fs.weighted_lm_loss(logits, joined("labels", -100), weight).backward()
    for ours, whole in zip(accumulated, model.parameters(), strict=True):
        torch.testing.assert_close(ours, whole.grad, rtol=0, atol=1e-6)


# -- iteration -------------------------------------------------------------------------------------


def test_nothing_is_pulled_before_the_first_next_and_a_peek_costs_nothing():
    loader = Recording(batches_of(gamma_losses(200)))
    stream = fs.FlowStream(loader, by_key)
    iter(stream)
    assert loader.num_pulled == 0
    assert len(list(stream)) == len(loader)
    assert stream.epoch == 0


def test_an_iter_after_a_delivered_batch_begins_the_next_epoch_and_ends_the_old():
    stream = fs.FlowStream(batches_of(gamma_losses(200)), by_key)
    old = iter(stream)
    first = next(old)
    new = iter(stream)
    assert next(old)["id"][0] == 16  # a peek has not ended it
    assert torch.equal(next(new)["id"], first["id"])
    assert stream.epoch == 1
    assert list(old) == []
    assert len(list(new)) == 12


def test_epochs_go_on_with_the_running_tau():
    losses = gamma_losses(2000)
    stream = fs.FlowStream(batches_of(losses), by_key, include=("tau",))
    list(stream)
    second = list(stream)
    assert stream.epoch == 1
    assert float(second[0]["flow_tau"]) == pytest.approx(np.median(losses.numpy()), rel=2e-3)


def test_a_generator_goes_on_where_it_was():
    stream = fs.FlowStream(iter(batches_of(gamma_losses(320))), by_key, window=2)
    first = list(itertools.islice(stream, 5))
    rest = list(stream)
    assert torch.equal(gathered(first + rest, "id"), torch.arange(320))


def test_pulls_are_spread_over_the_steps():
    loader = Recording(batches_of(gamma_losses(16 * 100)))
    stream = fs.FlowStream(loader, by_key, window=8, temperature=fs.FixedTemperature(1.0))
    counts = []
    for _ in stream:
        counts.append(loader.num_pulled)
    steps = np.diff(counts)
    assert counts[0] <= 8 + 2  # the first window, and a first share
    assert steps.max() <= 2
    assert set(steps[8:60].tolist()) == {1}


def test_a_window_is_scored_by_three_quarters_of_the_one_before():
    order = []

    class Batches(list):
        def __iter__(self):
            yield from super().__iter__()

    def score(batch):
        order.append(int(batch["id"][0]) // 16)
        return batch["loss"]

    stream = fs.FlowStream(
        Batches(batches_of(gamma_losses(16 * 64))),
        fs.FunctionScorer(score),
        window=8,
        temperature=fs.FixedTemperature(1.0),
    )
    for number, _ in enumerate(stream):
        if number % 8 == 5 and number < 48:  # after the sixth of eight
            assert order[-1] == number // 8 * 8 + 15
        if 8 <= number < 48 and number % 8 == 1:  # and a share at each step
            assert number // 8 * 8 + 8 <= order[-1] < number // 8 * 8 + 12


def test_length_is_the_loaders_where_it_has_one():
    batches = batches_of(gamma_losses(200))
    assert len(fs.FlowStream(batches, by_key)) == 13
    with pytest.raises(TypeError, match="has no length"):
        len(fs.FlowStream(iter(batches), by_key))
    with pytest.raises(TypeError, match="count steps"):
        len(fs.FlowStream(batches, by_key, mode="resample"))
    assert fs.FlowStream(iter(batches), by_key)


def test_a_data_loader_without_batching_passes_the_stream_through():
    stream = fs.FlowStream(batches_of(gamma_losses(200)), by_key)
    outer = DataLoader(stream, batch_size=None)
    assert torch.equal(gathered(list(outer), "id"), torch.arange(200))


def test_in_a_worker_it_raises_saying_so():
    loader = DataLoader(fs.FlowStream(batches_of(gamma_losses(200)), by_key), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match="iterated over in a worker process"):
        list(loader)


class Shuffled:
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class WithParts(list):
    def __init__(self, batches) -> None:
        super().__init__(batches)
        self.sampler, self.dataset = Shuffled(), Shuffled()


def test_set_epoch_reaches_the_sampler_and_the_data_set():
    loader = WithParts(batches_of(gamma_losses(40)))
    stream = fs.FlowStream(loader, by_key)
    list(stream)
    assert loader.sampler.epochs == []  # whatever the user set before the first epoch stands
    list(stream)
    stream.set_epoch(5)
    list(stream)
    assert loader.sampler.epochs == loader.dataset.epochs == [1, 5]
    assert stream.epoch == 5


def test_a_closed_stream_lets_go_and_says_so():
    with fs.FlowStream(batches_of(gamma_losses(200)), by_key) as stream:
        iterator = iter(stream)
        next(iterator)
    assert list(iterator) == []
    with pytest.raises(RuntimeError, match="the stream is closed"):
        next(iter(stream))


# -- bad input -------------------------------------------------------------------------------------


def with_losses(batches, changes: dict[int, float]):
    flat = gathered(batches, "loss").clone()
    for at, value in changes.items():
        flat[at] = value
    return batches_of(flat, len(batches[0]["loss"]))


def test_a_loss_that_is_not_finite_gets_weight_zero_and_stays_out_of_tau():
    clean = batches_of(gamma_losses(512))
    bad = with_losses(clean, {3: float("nan"), 40: float("inf"), 41: float("-inf")})
    stream = fs.FlowStream(bad, by_key, include=("tau",))
    out = list(stream)
    weight = gathered(out, "flow_weight")
    assert weight[[3, 40, 41]].tolist() == [0, 0, 0]
    assert stream.metrics()["flow/nonfinite"] == 3
    kept = np.delete(gathered(clean, "loss").numpy(), [3, 40, 41])
    assert float(out[0]["flow_tau"]) == pytest.approx(np.median(kept), rel=2e-3)


def test_too_many_losses_that_are_not_finite_raise_and_name_the_samples():
    bad = with_losses(batches_of(gamma_losses(64)), dict.fromkeys((16, 17, 18, 19), float("nan")))
    bad[1]["__key__"] = [f"shard-000/{i}" for i in range(16)]
    stream = fs.FlowStream(bad, by_key)
    with pytest.raises(
        ValueError, match=r"4 of 64 samples of window 0 .*batch 1: row 0 \(shard-000/0\).*max_bad_fraction"
    ):
        list(stream)
    assert len(list(fs.FlowStream(bad, by_key, max_bad_fraction=0.1))) == 4


def test_a_sample_without_labels_gets_weight_zero_and_is_counted(tiny):
    batches = language_batches(4)
    batches[1]["labels"][2] = -100
    stream = fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")))
    assert gathered(list(stream), "flow_weight")[6] == 0
    assert stream.metrics()["flow/empty"] == 1


def test_where_nothing_is_labelled_that_is_told_and_not_a_floor(tiny, caplog):
    batches = language_batches(4)
    for batch in batches:
        batch["labels"][:] = -100
    assert not gathered(list(fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")))), "flow_weight").any()
    (message,) = caplog.messages
    assert message.startswith("no sample so far has a label")


def test_a_negative_loss_is_refused():
    bad = with_losses(batches_of(gamma_losses(64)), {7: -0.5})
    with pytest.raises(ValueError, match=r"a loss of -0.5 nats.*FLOW needs a non-negative loss"):
        list(fs.FlowStream(bad, by_key))


def test_a_token_id_outside_the_vocabulary_is_refused_before_the_device_sees_it(tiny):
    batches = language_batches(4)
    batches[2]["input_ids"][1, 0] = 97
    with pytest.raises(ValueError, match="97"):
        list(fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama"))))


def test_labels_of_another_shape_are_refused(tiny):
    batches = language_batches(4)
    batches[0]["labels"] = batches[0]["labels"][:, :-1]
    with pytest.raises(ValueError, match="labels"):
        list(fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama"))))


def test_a_reference_that_is_being_trained_is_found():
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loader = [(torch.randn(8, 3), torch.randint(4, (8,))) for _ in range(64)]
    stream = fs.FlowStream(loader, fs.ClassifierScorer(model, copy=False), window=8)

    def train():
        for x, y, weight in stream:
            loss = fs.weighted_cross_entropy(model(x), y, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="copy"):
        train()


class Faulty:
    """Raises once, in place of the batch `at`, and goes on."""

    def __init__(self, batches, at: int) -> None:
        self.batches, self.at = batches, at

    def __iter__(self):
        return FaultyIterator(self.batches, self.at)


class FaultyIterator:
    def __init__(self, batches, at: int) -> None:
        self.rest, self.at, self.count = iter(batches), at, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count == self.at + 1:
            raise OSError("the disk is gone")
        return next(self.rest)


@pytest.mark.parametrize("at", [0, 1, 21, 60])
def test_a_loaders_error_comes_after_the_batches_before_it_and_the_stream_goes_on(at):
    stream = fs.FlowStream(
        Faulty(batches_of(gamma_losses(16 * 60)), at),
        by_key,
        window=8,
        temperature=fs.RunningMedian(warmup_samples=128),
    )
    iterator, out = iter(stream), []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        for batch in iterator:
            out.append(batch)
    assert len(out) == at
    assert f"raised by the loader at batch {at} of epoch 0" in caught.value.__notes__[0]
    assert ("window" in caught.value.__notes__[0]) is (at > 0)
    out += list(iterator)
    assert torch.equal(gathered(out, "id"), torch.arange(16 * 60))


def test_what_weakens_the_weights_is_told_once(caplog):
    generator = torch.Generator().manual_seed(0)
    nearly_equal = 5 + 0.01 * gamma_losses(8000)
    list(fs.FlowStream(batches_of(nearly_equal), by_key))
    assert [record for record in caplog.messages if "nearly uniform" in record] != []
    assert len(caplog.messages) == 1
    caplog.clear()
    list(
        fs.FlowStream(
            batches_of(torch.cat([torch.zeros(3000), gamma_losses(1000)])[torch.randperm(4000, generator=generator)]),
            by_key,
        )
    )
    assert sum("at its floor" in message for message in caplog.messages) == 1
    caplog.clear()
    gap = torch.where(torch.rand(4000, generator=generator) < 0.5, 0.1, 5.0) + 0.05 * gamma_losses(4000)
    list(fs.FlowStream(batches_of(gap), by_key))
    assert sum("in a gap of the losses" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "weigh"}, "mode is 'weigh': choose 'weight', 'resample' or Thin"),
        ({"level": "word"}, "level is 'word'"),
        ({"attach": "column"}, "attach is 'column'"),
        ({"include": "loss"}, r"include is 'loss': give a tuple"),
        ({"include": ("losses",)}, "include is 'losses'"),
        ({"policy": fs.Flow}, "policy is the class Flow: give an instance"),
        ({"policy": 3}, "policy is 3"),
        ({"window": 0}, "window is 0: give a whole number of at least 1 or 'auto'"),
        ({"window": 6, "accumulate": 4}, "no multiple of accumulate=4.*window=8"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"max_bad_fraction": 2}, "max_bad_fraction is 2"),
        ({"temperature": 1.5}, "temperature is 1.5"),
        ({"cache": 3}, "cache is 3"),
        ({"mode": "resample", "level": "token"}, "whole samples, not tokens"),
        ({"mode": "resample", "temperature": fs.WindowMedian()}, "circular"),
        ({"mode": "resample", "normalize": True}, "normalize=True has no effect"),
        ({"mode": "resample", "attach": "pair"}, "carry no weight"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        fs.FlowStream([], by_key, **arguments)


def test_a_loader_or_scorer_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cannot be iterated over"):
        fs.FlowStream(3, by_key)
    with pytest.raises(ValueError, match="it must be a scorer"):
        fs.FlowStream([], torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no losses at level 'token'"):
        fs.FlowStream([], by_key, level="token")
    with pytest.raises(ValueError, match="wrap the loader once"):
        fs.FlowStream(fs.FlowStream([], by_key), by_key)


def test_samples_in_place_of_batches_are_told():
    with pytest.raises(ValueError, match="has no rows: does the loader deliver batches"):
        next(iter(fs.FlowStream([{"loss": 0.5, "text": "a"}], by_key)))


# -- metrics and cache -----------------------------------------------------------------------------


def test_metrics_are_what_was_delivered():
    losses = gamma_losses(2048)
    stream = fs.FlowStream(batches_of(losses), by_key)
    weight = gathered(list(stream), "flow_weight").double()
    metrics = stream.metrics()
    assert metrics.keys() == {
        f"flow/{name}"
        for name in (
            *("tau", "tau_error", "mean_weight", "ess", "samples_seen", "samples_emitted", "acceptance", "nonfinite"),
            *("empty", "cache_hit_rate", "score_seconds", "wait_seconds", "padding_fraction", "padded_batches"),
            "window_seconds",
        )
    }
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["flow/samples_seen"] == metrics["flow/samples_emitted"] == 2048
    assert metrics["flow/acceptance"] == 1
    assert metrics["flow/mean_weight"] == pytest.approx(float(weight.mean()))
    assert metrics["flow/ess"] == pytest.approx(float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())))
    assert abs(metrics["flow/tau"] - np.median(losses.numpy())) < 3 * metrics["flow/tau_error"]


def test_a_second_epoch_scores_nothing_and_changes_no_weight(tiny):
    batches = language_batches(16)
    stream = fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")), temperature=fs.FixedTemperature(3.0))
    first = gathered(list(stream), "flow_weight")
    assert stream.metrics()["flow/cache_hit_rate"] == 0
    assert stream.metrics()["flow/padding_fraction"] == 0  # packs have none
    assert torch.equal(gathered(list(stream), "flow_weight"), first)
    assert stream.metrics()["flow/cache_hit_rate"] == 0.5
    without = fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")), temperature=fs.FixedTemperature(3.0), cache=None)
    assert torch.equal(gathered([*without, *without], "flow_weight"), first.repeat(2))
    assert without.metrics()["flow/cache_hit_rate"] == 0


def test_cache_key_names_the_sample_whatever_its_content():
    model = torch.nn.Linear(3, 4)
    names = [f"image-{i}" for i in range(8)]

    def augmented():
        for _ in range(2):
            yield {"input": torch.randn(8, 3), "labels": torch.arange(8) % 4, "__key__": names}

    scorer = fs.ClassifierScorer(model)
    temperature = fs.FixedTemperature(1.0)
    first, second = fs.FlowStream(augmented(), scorer, cache_key="__key__", window=1, temperature=temperature)
    assert torch.equal(first["flow_weight"], second["flow_weight"])
    with pytest.raises(ValueError, match="cache_key is 'id'.*__key__"):
        list(fs.FlowStream(augmented(), scorer, cache_key="id"))


def test_progress_shows_the_first_window_and_a_line(capsys):
    stream = fs.FlowStream(batches_of(gamma_losses(2048)), by_key, progress=True)
    with stream:
        assert len(list(stream)) == 128
    shown = capsys.readouterr().err
    assert "flowstream epoch 0 window" in shown
    assert "τ" in shown


def test_the_callers_random_state_and_grad_mode_are_untouched(tiny):
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_numpy = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    stream = fs.FlowStream(language_batches(40), fs.CausalLMScorer(tiny("llama")), mode="resample", window=4)
    for _ in stream:
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == before_numpy


def test_a_dataclass_is_rebuilt_not_changed():
    item = Item(X, Y)
    (out,) = fs.FlowStream([item], fs.FunctionScorer(lambda b: b.y), temperature=FIXED)
    assert replace(out, flow_weight=None) == item or out.x is item.x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_on_a_gpu_batches_stay_where_they_are_and_weights_are_those_of_the_cpu(tiny, mode):
    batches = language_batches(24)
    on_gpu = [{key: value.cuda() for key, value in batch.items()} for batch in batches]
    settings = {"mode": mode, "temperature": fs.FixedTemperature(5.0), "include": ("weight", "index"), "cache": None}
    expected = list(fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")), **settings))
    for loader, device in ((batches, "cpu"), (on_gpu, "cuda")):
        out = list(fs.FlowStream(loader, fs.CausalLMScorer(tiny("llama").cuda()), **settings))
        for ours, theirs in zip(out, expected, strict=True):
            assert {value.device.type for value in ours.values()} == {device}
            assert torch.equal(ours["flow_index"].cpu(), theirs["flow_index"])
            torch.testing.assert_close(ours["flow_weight"].cpu(), theirs["flow_weight"], rtol=0, atol=1e-4)


# -- what the caller does around it ----------------------------------------------------------------


def test_progress_does_not_pull_an_endless_loader_in_either_mode(capsys):
    for mode in ("weight", "resample"):
        loader = itertools.cycle(batches_of(gamma_losses(320)))
        stream = fs.FlowStream(loader, by_key, mode=mode, window=4, temperature=FIXED, progress=True)
        assert len(list(itertools.islice(stream, 30))) == 30
    assert "flowstream epoch 0" in capsys.readouterr().err


def test_weights_taken_in_inference_mode_can_be_trained_with():
    stream = fs.FlowStream(batches_of(gamma_losses(320)), by_key)
    iterator = iter(stream)
    with torch.inference_mode():
        next(iterator)
    parameter = torch.ones(16, requires_grad=True)
    for batch in iterator:
        (parameter * batch["flow_weight"]).sum().backward()
    assert parameter.grad is not None


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_the_callers_default_dtype_and_device_do_not_leak_in(mode):
    include = ("loss", "tau", "denominator", "weight", "index")
    losses = gamma_losses(640)

    def delivered():
        return list(fs.FlowStream(batches_of(losses), by_key, mode=mode, include=include))

    expected = delivered()
    batches = batches_of(losses)
    stream = fs.FlowStream(batches, by_key, mode=mode, include=include)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out = list(stream)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(out, expected, strict=True):
        for key in ("flow_loss", "flow_tau", "flow_denominator", "flow_weight", "flow_index"):
            assert one[key].dtype == other[key].dtype
            assert torch.equal(one[key], other[key])


def test_a_function_is_scored_outside_of_the_callers_autocast():
    seen = []
    stream = fs.FlowStream(
        batches_of(gamma_losses(64)),
        fs.FunctionScorer(lambda b: seen.append(torch.is_autocast_enabled("cpu")) or b["loss"]),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(stream)
    assert set(seen) == {False}


def test_delivered_batches_are_let_go_and_share_nothing():
    class Fresh:
        def __iter__(self):
            for seed in range(60):
                batch = {"loss": gamma_losses(16, seed)}
                alive.append(weakref.ref(batch["loss"]))
                yield batch
                del batch

    alive: list[weakref.ref] = []
    stream = fs.FlowStream(
        Fresh(), fs.FunctionScorer(lambda b: b["loss"].clone()), window=20, temperature=FIXED, include=("loss",)
    )
    previous = None
    for number, batch in zip(range(59), stream, strict=False):
        state_before = stream.state_dict()["position"][0]["losses"].clone()
        batch["flow_loss"].zero_()
        batch["flow_weight"].mul_(2)
        assert torch.equal(stream.state_dict()["position"][0]["losses"], state_before)
        assert batch["flow_weight"].untyped_storage().nbytes() == batch["flow_weight"].nbytes
        previous = batch
        if number % 8 == 0:  # collecting takes long among all that other tests hold
            gc.collect()
            assert not any(reference() is not None for reference in alive[:number])
    assert previous is batch
    del previous, batch
    list(stream)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_stop_iteration_in_a_function_of_the_users_is_an_error():
    empty = iter(())
    stream = fs.FlowStream(batches_of(gamma_losses(64)), fs.FunctionScorer(lambda batch: next(empty)))
    with pytest.raises(RuntimeError, match="raised StopIteration in epoch 0, window 0"):
        list(stream)


def test_a_loader_that_failed_at_its_first_batch_is_begun_anew():
    class Once:
        failed = False

        def __iter__(self):
            if not self.failed:
                self.failed = True
                raise OSError("not yet")
            yield from batches_of(gamma_losses(64))

    stream = fs.FlowStream(Once(), by_key)
    with pytest.raises(OSError, match="not yet"):
        list(stream)
    assert len(list(stream)) == 4
    assert stream.epoch == 0


def test_an_iterator_is_not_dropped_by_set_epoch():
    stream = fs.FlowStream(iter(batches_of(gamma_losses(640))), by_key, window=2)
    next(iter(stream))
    with pytest.raises(ValueError, match="cannot be read again"):
        stream.set_epoch(1)
    assert len(list(stream)) == 39


def test_denominators_count_what_the_loss_counts_in_left_padded_and_packed_rows(tiny):
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    left = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    packed = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat([torch.arange(3), torch.arange(5)]).expand(2, 8),
    }
    for batch in (left, packed):
        (out,) = fs.FlowStream([batch], fs.CausalLMScorer(tiny("llama")), include=("denominator",), temperature=FIXED)
        logits = torch.randn(2, 8, 97)
        weight = out["flow_weight"]
        by_stream = fs.weighted_lm_loss(logits, out["labels"], weight, denominator=out["flow_denominator"])
        torch.testing.assert_close(by_stream, fs.weighted_lm_loss(logits, out["labels"], weight), rtol=1e-6, atol=0)


def test_the_warm_up_stays_within_the_bytes_of_a_window():
    for mode in ("weight", "resample"):
        loader = Recording(batches_of(gamma_losses(16 * 200)))
        next(iter(fs.FlowStream(loader, by_key, mode=mode, max_window_bytes=1)))
        assert loader.num_pulled <= 16  # without the limit 67 and more
