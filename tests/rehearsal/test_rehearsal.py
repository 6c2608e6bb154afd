"""Rehearsal in a stream: its share, its draws, its feedback, and what stays as it was."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from batches import batches_of, by_key, gamma_losses, gathered
from rehearsals import Known, always, damaged_at, evenly, is_rehearsed, rehearsal_of, stream_of
from resuming import take, through_a_file
from torch.utils.data import DataLoader, TensorDataset

import flowstream as fs
from flowstream.rehearsal import Rehearsal

MODES: dict[str, dict[str, Any]] = {
    "weighted": {},
    "tokens of one": {"policy": fs.HardFirst(max_weight=3.0), "normalize": True},
    "resampled": {"mode": "resample"},
    "steps of two": {"accumulate": 2, "include": ("tau", "denominator", "index", "loss")},
    "resampled, steps of two": {"mode": "resample", "accumulate": 2, "include": ("weight", "denominator")},
}


def walked(stream: fs.FlowStream, num: int, right: Any) -> list[dict[str, Any]]:
    """The next `num` batches over epochs, with feedback on each as soon as it is there."""
    found: list[dict[str, Any]] = []
    while len(found) < num:
        for batch in stream:
            found.append(batch)
            if is_rehearsed(batch):
                stream.feedback(batch, right(stream, batch))
            if len(found) == num:
                break
    return found


# -- what is delivered -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weighted", "tokens of one", "resampled"])
def test_the_loaders_batches_are_what_they_were(name):
    plain = take(stream_of(None, **MODES[name]), 30)
    with stream_of(rehearsal_of(evenly(100)), **MODES[name]) as stream:
        own = [batch for batch in walked(stream, 80, damaged_at([0.5] * 4)) if not is_rehearsed(batch)][:30]
    assert len(own) == 30
    for ours, theirs in zip(own, plain, strict=True):
        assert ours.pop("flow_rehearsed").tolist() == [-1] * len(ours["id"])
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == value if key == "name" else torch.equal(ours[key], value)


@pytest.mark.parametrize("ratio", [0.1, 0.6])
@pytest.mark.parametrize("name", MODES)
def test_the_share_of_compute_is_the_ratio_over_time(ratio, name):
    settings = MODES[name]
    with stream_of(rehearsal_of(evenly(100), ratio=ratio), **settings) as stream:
        batches = walked(stream, 100, damaged_at([0.5] * 4))
        rows = dict.fromkeys((False, True), 0)
        for batch in batches:
            rows[is_rehearsed(batch)] += len(batch["id"])
        assert stream.metrics()["flow/rehearsed_fraction"] == rows[True] / sum(rows.values())
    # A window's rehearsed batches are spread over it: at any time they lag by what a step takes, or lead.
    late = rows[False] * ratio / (1 - ratio) - rows[True]
    assert abs(late) <= 16 * (1 + settings.get("accumulate", 1)) * (1 + ratio / (1 - ratio))


def test_rehearsed_batches_are_the_prior_samples_with_their_weight():
    prior = evenly(50)
    include = ("loss", "tau", "index", "denominator")
    with stream_of(rehearsal_of(prior, weight=0.5), include=include) as stream:
        rehearsed = [batch for batch in take(stream, 40) if is_rehearsed(batch)]
    assert rehearsed
    for batch in rehearsed:
        which = batch["flow_rehearsed"]
        assert len(which) == 16
        assert torch.equal(batch["id"], 1000 + which)
        assert torch.equal(batch["loss"], prior.losses[which])
        assert torch.equal(batch["flow_loss"], prior.losses[which])
        assert batch["name"] == [f"prior {i}" for i in which.tolist()]
        assert batch["flow_weight"].tolist() == [0.5] * 16
        assert batch["flow_index"].tolist() == [-1] * 16
        assert batch["flow_denominator"] == 16
        assert batch["flow_tau"] > 0


@pytest.mark.parametrize("name", ["steps of two", "resampled, steps of two"])
def test_a_steps_denominator_counts_its_rehearsed_samples(name):
    with stream_of(rehearsal_of(evenly(100), ratio=0.3), num=16 * 21 + 5, **MODES[name]) as stream:
        for _ in range(2):
            batches = list(stream)
            for first in range(0, len(batches), 2):
                step = batches[first : first + 2]
                assert {float(batch["flow_denominator"]) for batch in step} == {sum(len(b["id"]) for b in step)}


def test_each_sample_of_a_bin_comes_before_one_comes_again():
    with stream_of(rehearsal_of(evenly(96), strategy="random")) as stream:
        drawn = gathered([batch for batch in take(stream, 60) if is_rehearsed(batch)], "flow_rehearsed").tolist()
    assert len(drawn) > 192
    for begin in (0, 96):
        assert sorted(drawn[begin : begin + 96]) == list(range(96))


@pytest.mark.parametrize("attach", ["key", "pair"])
def test_tuples_gain_an_element(attach):
    def set_of(num: int) -> TensorDataset:
        return TensorDataset(torch.rand(num), torch.arange(num))

    scorer = fs.FunctionScorer(lambda batch: batch[0])
    rehearsal = Rehearsal(set_of(40), scorer, was_correct=always, label=lambda sample: int(sample[1]) % 2, bins=1)
    stream = fs.FlowStream(
        DataLoader(set_of(80), batch_size=8), scorer, attach=attach, include=("tau",), rehearsal=rehearsal
    )
    kinds = Counter()
    for item in stream:
        if attach == "pair":
            batch, weight, extras = item
            rehearsed = extras["flow_rehearsed"]
            assert list(extras) == ["flow_tau", "flow_rehearsed"]
            assert len(batch) == 2
        else:
            _, _, weight, _, rehearsed = item
        assert weight.shape == rehearsed.shape == (8,)
        kinds[bool(rehearsed[0] >= 0)] += 1
        stream.feedback(rehearsed, torch.ones(8) if rehearsed[0] >= 0 else None)
    assert kinds == {False: 10, True: 3}
    assert stream.rehearsal is not None
    assert stream.rehearsal.names == ("0", "1")
    with pytest.raises(TypeError, match="count steps"):
        len(stream)


# -- what is learned -------------------------------------------------------------------------------


def test_rates_are_the_means_of_a_beta_posterior_of_what_was_told():
    right = damaged_at([0.9, 0.5, 0.1, 0.0])
    num, damaged = np.zeros(4), np.zeros(4)
    was_correct = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.7
    rehearsal = rehearsal_of(evenly(100), was_correct=lambda s: was_correct[s["id"] - 1000], prior_counts=(1.0, 4.0))
    with stream_of(rehearsal) as stream:
        for batch in stream:
            if not is_rehearsed(batch):
                continue
            told = right(stream, batch)
            stream.feedback(batch, told)
            for sample, is_right in zip(batch["flow_rehearsed"].tolist(), told.tolist(), strict=True):
                num[sample // 25] += 1
                damaged[sample // 25] += was_correct[sample] and not is_right
        next(iter(stream))  # the first window of the next epoch: all was agreed upon
        assert stream.rehearsal is not None
        assert stream.rehearsal.counts().tolist() == num.tolist()
        assert stream.rehearsal.rates() == pytest.approx((1 + damaged) / (5 + num), abs=1e-15)
        assert stream.metrics()["flow/damage_rate"] == pytest.approx(stream.rehearsal.rates().mean())


TRUE = np.array([0.02, 0.1, 0.3, 0.6])


def test_rates_converge_to_the_true_ones():
    """Four bins, 2,000 rehearsed samples, the usual half-life, six runs: every rate within 5 percentage points of its
    own, each bin's root mean square error below half of that, and the damage of all prior data within 5 % of itself.

    No estimate does much better: of n draws the binomial error is (p (1 - p) / n)^½, here .01 to .02.
    """
    found, totals = [], []
    for seed in range(6):
        rehearsal = rehearsal_of(evenly(200), half_life=2000.0, seed=seed)
        with stream_of(rehearsal, num=2100, batch_size=50, policy=fs.Uniform()) as stream:
            batches = walked(stream, 81, damaged_at(TRUE, seed))
            assert stream.rehearsal is not None
            assert sum(len(b["id"]) for b in batches if is_rehearsed(b)) <= 2050
            found.append(stream.rehearsal.rates())
            totals.append(stream.metrics()["flow/damage_rate"])
    errors = np.array(found) - TRUE
    assert np.abs(errors).max() < 0.05
    assert np.sqrt((errors**2).mean(0)).max() < 0.025
    assert totals == pytest.approx([TRUE.mean()] * 6, rel=0.05)


def test_bins_are_drawn_by_rate_times_size():
    prior = Known(torch.arange(100.0))
    rehearsal = rehearsal_of(prior, bins=1, label=lambda s: "large" if s["id"] < 1080 else "small")
    rates = np.array([0.1, 0.8])
    with stream_of(rehearsal, num=4800, batch_size=40, policy=fs.Uniform()) as stream:
        batches = walked(stream, 230, damaged_at(rates))[70:]
    drawn = gathered([batch for batch in batches if is_rehearsed(batch)], "flow_rehearsed")
    expected = 0.1 * 80 / (0.1 * 80 + 0.8 * 20)
    assert float((drawn < 80).float().mean()) == pytest.approx(expected, abs=0.05)


def test_no_bin_freezes():
    """A bin without damage for long, and then with nothing else: it is found again."""
    now = [0.0, 0.5, 0.5, 0.5]
    with stream_of(rehearsal_of(evenly(80), half_life=300), num=6400, batch_size=40, policy=fs.Uniform()) as stream:
        right = damaged_at(lambda: now)
        early = walked(stream, 100, right)
        assert stream.rehearsal is not None
        assert stream.rehearsal.rates()[0] < 0.1
        shares = [float((batch["flow_rehearsed"] < 20).float().mean()) for batch in early if is_rehearsed(batch)]
        assert 0 < np.mean(shares[-16:]) < 0.1  # hardly drawn, but drawn
        now = [1.0, 0.0, 0.0, 0.0]
        walked(stream, 100, right)
        assert stream.rehearsal.rates()[0] > 0.9
        assert stream.rehearsal.rates()[1:].max() < 0.2


def test_random_rehearsal_scores_nothing_and_needs_no_feedback(caplog):
    def refused(batch: Any) -> Any:
        if int(batch["id"][0]) >= 1000:
            raise AssertionError("a prior batch was scored")
        return batch["loss"]

    rehearsal = Rehearsal(evenly(64), fs.FunctionScorer(refused), strategy="random", ratio=0.5)
    with stream_of(rehearsal) as stream:
        drawn = gathered([batch for batch in take(stream, 66) if is_rehearsed(batch)], "flow_rehearsed")
        stream.feedback(drawn[-16:], torch.ones(16))
        assert np.isnan(stream.metrics()["flow/damage_rate"])
    counts = Counter(drawn.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 64
    assert not caplog.records


def test_missing_feedback_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "flowstream"), stream_of(rehearsal_of(evenly(64))) as stream:
        take(stream, 12)
        assert not caplog.records
        take(stream, 300)
    assert len([record for record in caplog.records if "without feedback" in record.message]) == 1


def test_a_prior_model_that_gets_nothing_right_is_told(caplog):
    with caplog.at_level(logging.WARNING, "flowstream"):
        take(stream_of(rehearsal_of(evenly(64), was_correct=lambda _: False)), 1)
    assert "none of the 64 prior samples right" in caplog.text


def test_feedback_may_come_late():
    """A trainer that pulls batches ahead: what is told is told, a window later."""
    waiting: list[Any] = []
    with stream_of(rehearsal_of(evenly(64)), num=16 * 60) as stream:
        num = 0
        for batch in stream:
            if is_rehearsed(batch):
                waiting.append(batch)
            if len(waiting) == 7:
                for late in waiting:
                    stream.feedback(late["flow_rehearsed"], torch.zeros(16, dtype=torch.bool))
                    num += 16
                waiting = []
        next(iter(stream))
        assert stream.rehearsal is not None
        assert stream.rehearsal.counts().sum() == num


# -- state -----------------------------------------------------------------------------------------


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def deterministic(stream: fs.FlowStream, batch: dict[str, Any]) -> torch.Tensor:
    """Right or wrong by the sample and the weight of what was agreed before: no generator of its own."""
    assert stream.rehearsal is not None
    return (batch["flow_rehearsed"] * 7 + int(stream.rehearsal.counts().sum())) % 3 > 0


@pytest.mark.parametrize("name", MODES)
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(name):
    def new() -> fs.FlowStream:
        rehearsal = rehearsal_of(evenly(90), half_life=200.0, ratio=0.4)
        return stream_of(rehearsal, num=16 * 9 + 5, **MODES[name])

    states: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []
    with new() as stream:
        while len(expected) < 36:
            for batch in stream:
                expected.append(plain(batch))
                if is_rehearsed(batch):
                    stream.feedback(batch, deterministic(stream, batch))
                states.append(through_a_file(stream.state_dict()))
                if len(expected) == 36:
                    break
        assert stream.rehearsal is not None
        rates, metrics = stream.rehearsal.rates(), stream.metrics()
    for number in range(0, 35, 4):
        with new() as again:
            again.load_state_dict(states[number])
            found = walked(again, 35 - number, deterministic)
            assert [plain(batch) for batch in found] == expected[number + 1 :], number
            assert again.rehearsal is not None
            assert (again.rehearsal.rates() == rates).all()
            assert again.metrics()["flow/rehearsed_fraction"] == metrics["flow/rehearsed_fraction"]
            assert again.state_dict()["rehearsal"] == states[-1]["rehearsal"]


def test_an_interrupted_window_and_an_abandoned_epoch_lose_no_feedback():
    with stream_of(rehearsal_of(evenly(90)), num=16 * 20) as stream:
        told = 0
        for num in (3, 9, 11, 40):
            iterator = iter(stream)
            for batch in (next(iterator) for _ in range(min(num, 30))):
                if is_rehearsed(batch):
                    stream.feedback(batch, torch.ones(len(batch["id"])))
                    told += len(batch["id"])
        next(iter(stream))
        assert stream.rehearsal is not None
        assert stream.rehearsal.counts().sum() == told


def test_states_of_another_rehearsal_are_refused():
    with stream_of(rehearsal_of(evenly(90))) as stream:
        walked(stream, 12, damaged_at([0.5] * 4))
        state = through_a_file(stream.state_dict())
    with pytest.raises(ValueError, match="rehearsal=Rehearsal.*bins=4.*bins=3"):
        stream_of(rehearsal_of(evenly(90), bins=3)).load_state_dict(state)
    with pytest.raises(ValueError, match="rehearsal=Rehearsal.*this stream has rehearsal=None"):
        stream_of(None).load_state_dict(state)
    with pytest.raises(ValueError, match="taken with rehearsal=None"):
        stream_of(rehearsal_of(evenly(90))).load_state_dict(stream_of(None).state_dict())
    other = Known(torch.arange(90.0).flip(0))
    again = stream_of(rehearsal_of(other))
    again.load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of a rehearsal with 4 bins"):
        next(iter(again))
    with pytest.raises(ValueError, match="the state is of a rehearsal with 4 bins"):
        again.load_state_dict(state)
    again = stream_of(rehearsal_of(other))
    again.load_state_dict(state, strict=False)
    take(again, 3)
    assert again.rehearsal is not None
    assert again.rehearsal.rates().tolist() == [0.5] * 4


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 91}, "bins is 91.*1 to the 90"),
        ({"bins": 0}, "bins is 0"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1}, "ratio is 1"),
        ({"ratio": "a"}, "ratio is 'a': give a number"),
        ({"half_life": "a"}, "half_life is 'a': give a number"),
        ({"collate_fn": 3}, "collate_fn is 3: give a function"),
        ({"prior_counts": None}, "prior_counts is None: give two numbers"),
        ({"prior_counts": (1, "b")}, "give two numbers"),
        ({"strategy": "mix"}, "choose 'mix-cd' or 'random'"),
        ({"criterion": "f1"}, "criterion is 'f1'"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"half_life": 0}, "half_life is 0"),
        ({"prior_counts": (0.0, 1.0)}, "bins would freeze"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"was_correct": None}, "no model to ask what it got right"),
        ({"cache": "losses"}, "leave cache at 'memory'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        rehearsal_of(evenly(90), **settings)


def test_prior_data_that_cannot_be():
    with pytest.raises(ValueError, match="prior is empty"):
        rehearsal_of(evenly(0))
    with pytest.raises(ValueError, match="prior is a generator"):
        rehearsal_of(i for i in range(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give Rehearsal\\(prior, scorer"):
        stream_of("yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label is 'domain', but a prior sample has no such field, only 'loss'"):
        next(iter(stream_of(rehearsal_of(evenly(90), label="domain"))))
    few = rehearsal_of(evenly(90), collate_fn=lambda samples: {"loss": torch.zeros(3), "id": torch.zeros(3)})
    with pytest.raises(ValueError, match="collate_fn made 3 samples of prior samples 0 to 7"):
        next(iter(stream_of(few)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("name"), "the loader's batches have the field 'name', and the prior have not"),
        (lambda batch: batch.update(extra=1), "the prior batches have the field 'extra', and the loader's have not"),
    ],
)
def test_fields_that_differ_are_named(change, message):
    def collate(samples: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(samples)
        change(batch)
        return batch

    with pytest.raises(ValueError, match=message):
        take(stream_of(rehearsal_of(evenly(90), collate_fn=collate)), 8)


def test_feedback_that_cannot_be():
    with stream_of(rehearsal_of(evenly(90))) as stream:
        assert stream.rehearsal is not None
        for early in ("rates", "counts"):
            with pytest.raises(ValueError, match="nothing is rehearsed before"):
                getattr(stream.rehearsal, early)()
        with pytest.raises(ValueError, match="nothing is rehearsed before"):
            assert stream.rehearsal.prior
        with pytest.raises(ValueError, match="nothing is rehearsed before"):
            stream.feedback(torch.tensor([3]), torch.tensor([True]))
        batch = next(batch for batch in stream if is_rehearsed(batch))
        right = torch.ones(16, dtype=torch.bool)
        with pytest.raises(ValueError, match="correct has shape \\[15\\] for 16"):
            stream.feedback(batch, right[1:])
        with pytest.raises(ValueError, match=r"correct holds 0\.5"):
            stream.feedback(batch, right * 0.5)
        for value, dtype in ((2, torch.int64), (-100, torch.int32), (255, torch.uint8), (float("nan"), torch.float32)):
            with pytest.raises(ValueError, match=f"correct holds {value:g}: give bools"):
                stream.feedback(batch, torch.full((16,), value, dtype=dtype))
        with pytest.raises(ValueError, match="correct is a list that no tensor can be made of"):
            stream.feedback(batch, ["yes"] * 16)
        with pytest.raises(ValueError, match="FunctionScorer has no model that tells .* 'token_accuracy' must know"):
            stream.feedback(batch, logits=torch.zeros(16, 3, 2), labels=torch.zeros(16, 3))
        with pytest.raises(ValueError, match="either `correct`"):
            stream.feedback(batch)
        with pytest.raises(ValueError, match="either `correct`"):
            stream.feedback(batch, right, logits=torch.zeros(16, 2))
        with pytest.raises(ValueError, match="needs the batch's labels"):
            stream.feedback(batch, logits=torch.zeros(16, 2))
        with pytest.raises(ValueError, match="without flow_rehearsed"):
            stream.feedback({"loss": batch["loss"]}, right)
        with pytest.raises(ValueError, match=r"a tensor of torch\.bool"):
            stream.feedback(right, right)
        other = min(set(range(90)) - set(batch["flow_rehearsed"].tolist()))
        with pytest.raises(ValueError, match=f"prior sample {other} \\(1 of 2\\), which awaits none"):
            stream.feedback(torch.tensor([int(batch["flow_rehearsed"][0]), other]), right[:2])
        stream.feedback(batch, right.int())
        with pytest.raises(ValueError, match=r"\(16 of 16\), which awaits none"):
            stream.feedback(batch, right)
    with pytest.raises(ValueError, match="rehearses nothing"):
        stream_of(None).feedback(batch, right)


@pytest.mark.parametrize("criterion", ["class", lambda logits, labels: logits.argmax(-1) == labels])
def test_logits_are_judged_without_a_model_where_no_position_matters(criterion):
    with stream_of(rehearsal_of(evenly(90), criterion=criterion)) as stream:
        batch = next(batch for batch in stream if is_rehearsed(batch))
        with pytest.raises(ValueError, match="labels is a list that no tensor can be made of"):
            stream.feedback(batch, logits=torch.zeros(16, 2), labels=["a"] * 16)
        logits, labels = torch.eye(2).repeat(8, 1), np.zeros(16, dtype=np.int64)
        stream.feedback(batch, logits=logits, labels=labels)
        assert stream.rehearsal is not None
        assert sum(stream.rehearsal.ledger.pending) == 16 + 8


@pytest.mark.parametrize(("rows", "width"), [(1, 24), (4, 24), (4, 96), (4, 3)])
def test_the_first_window_knows_how_wide_the_prior_samples_are(rows, width):
    """Three times as wide as a batch of the loader's, as its rows, or narrower: one window, the warm-up's."""

    def row(length: int, loss: float) -> dict[str, Any]:
        return {"input_ids": torch.ones(length, dtype=torch.int64), "loss": torch.tensor(loss)}

    loader = list(DataLoader([row(8, 1.0 + i) for i in range(48 * rows)], batch_size=rows))
    rehearsal = Rehearsal([row(width, float(i)) for i in range(40)], by_key, bins=2, ratio=0.25, was_correct=always)
    with fs.FlowStream(loader, by_key, rehearsal=rehearsal, window=48, cache=None) as stream:
        read = {False: 0, True: 0}
        for batch in stream:
            read[is_rehearsed(batch)] += batch["input_ids"].numel()
    late = read[False] / 3 - read[True]
    assert 0 <= late < max(width, 8 * rows)


def test_the_states_of_two_ranks_go_on_as_one():
    """Between epochs, over any loader: the rates of both, and what neither had told."""
    states = []
    for rank in range(2):
        with stream_of(rehearsal_of(evenly(90)), num=16 * 12) as stream:
            for batch in stream:
                if is_rehearsed(batch):
                    stream.feedback(batch, torch.zeros(len(batch["id"])))
            state = through_a_file(stream.state_dict())
            states.append(state | {"world_size": 2, "rank": rank})
    together = fs.merge_states(states)
    untold = [sum(state["rehearsal"][0]["pending"][:4]) for state in states]
    assert min(untold) > 0
    with stream_of(rehearsal_of(evenly(90)), num=16 * 12) as stream:
        stream.load_state_dict(through_a_file(together))
        take(stream, 1)
        assert stream.rehearsal is not None
        before = sum(states[0]["running"][0]["rehearsal"]["damage"]["num"])
        assert stream.rehearsal.counts().sum() == before + sum(untold)


def test_another_number_of_ranks_goes_on_within_an_epoch():
    """Rehearsed batches are none of the loader's: of its samples none is lost or repeated."""
    samples = [{"loss": torch.tensor(1.0 + i % 7), "id": i, "name": str(i)} for i in range(160)]

    def new() -> fs.FlowStream:
        loader = DataLoader(samples, batch_size=8, sampler=fs.ElasticDistributedSampler(samples, seed=3))
        return fs.FlowStream(loader, by_key, window=4, rehearsal=rehearsal_of(evenly(90)), cache=None)

    for stop in (1, 6, 13, 22):
        with new() as stream:
            before = walked(stream, stop, damaged_at([0.5] * 4))
            state = fs.merge_states([through_a_file(stream.state_dict())])
        with new() as again:
            again.load_state_dict(through_a_file(state))
            after = list(again)
        own = [batch for batch in (*before, *after) if not is_rehearsed(batch)]
        assert sorted(gathered(own, "id").tolist()) == list(range(160))


def test_labels_and_answers_may_be_given_as_sequences():
    domains, answers = np.arange(90) % 3, torch.arange(90) % 2 == 0
    stream = stream_of(rehearsal_of(evenly(90), bins=1, label=domains, was_correct=answers))
    next(iter(stream))
    assert stream.rehearsal is not None
    assert stream.rehearsal.names == ("0", "1", "2")
    assert (stream.rehearsal.prior.bins.of == domains).all()
    assert stream.rehearsal.prior.was_correct.tolist() == answers.tolist()
    with pytest.raises(ValueError, match="label is a list beside 90 prior samples"):
        rehearsal_of(evenly(90), label=[1, 2])
    assert str(rehearsal_of(evenly(3), bins=1, label=[1, 2, 3])) != str(
        rehearsal_of(evenly(3), bins=1, label=[1, 2, 2])
    )


def test_batches_of_known_losses_are_left_alone():
    """The loader's own batches gain their fields; they themselves do not change."""
    loader = batches_of(gamma_losses(64))
    list(fs.FlowStream(loader, by_key, rehearsal=rehearsal_of(evenly(32)), window=2))
    assert all(set(batch) == {"loss", "id", "name"} for batch in loader)
