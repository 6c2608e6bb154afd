"""State and resume: a stopped stream delivers what the uninterrupted one would have."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from batches import Recording, batches_of, by_key, gamma_losses
from resuming import take, through_a_file
from torch.utils.data import default_collate

import flowstream as fs

INCLUDE = ("tau", "index", "loss", "weight", "denominator")
KINDS = {
    "weight": {"mode": "weight", "window": 4, "accumulate": 2},
    "normalized": {"mode": "weight", "window": 4, "normalize": True, "policy": fs.Permuted(fs.Flow())},
    "half-life": {
        "mode": "weight",
        "window": 4,
        "temperature": fs.RunningMedian(warmup_samples=64, half_life_samples=99),
    },
    "tdigest": {"mode": "weight", "window": 4, "temperature": fs.RunningMedian(warmup_samples=64, backend="tdigest")},
    "thin": {"mode": "resample", "window": 3},
    "mostly rejected": {"mode": fs.Thin(0.02), "window": 1},
    "systematic": {"mode": fs.Systematic(2.0), "window": 3},
}


def stream_of(kind: str) -> fs.FlowStream:
    settings = {"temperature": fs.RunningMedian(warmup_samples=96)} | KINDS[kind]
    return fs.FlowStream(batches_of(gamma_losses(16 * 21 + 5)), by_key, include=INCLUDE, cache=None, **settings)


def assert_same(ours: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            same = one[key] == other[key] if key == "name" else torch.equal(one[key], other[key])
            assert same, key


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_stream_equals_uninterrupted_stream_at_every_stop(kind):
    per_epoch = len(list(stream_of(kind)))
    whole = take(stream_of(kind), per_epoch + 12)
    for stop in range(per_epoch + 8):
        first = stream_of(kind)
        assert_same(take(first, stop), whole[:stop])
        second = stream_of(kind)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert second.epoch == first.state_dict()["epoch"]
        assert_same(take(second, 3), whole[stop : stop + 3])
        third = stream_of(kind)  # a second resume is where others break
        third.load_state_dict(through_a_file(second.state_dict()))
        assert_same(take(third, 1), whole[stop + 3 : stop + 4])
        assert third.metrics()["flow/samples_emitted"] == sum(len(batch["id"]) for batch in whole[: stop + 4])


def test_a_state_is_the_consumers_position_not_the_loaders():
    loader = Recording(batches_of(gamma_losses(400)))
    stream = fs.FlowStream(loader, by_key, window=4, temperature=fs.FixedTemperature(1.0))
    iterator = iter(stream)
    taken = [next(iterator)["id"] for _ in range(3)]
    assert loader.num_pulled > 3
    resumed = fs.FlowStream(Recording(loader.batches), by_key, window=4, temperature=fs.FixedTemperature(1.0))
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(torch.cat([*taken, *(batch["id"] for batch in resumed)]), torch.arange(400))


def test_a_state_taken_on_the_last_batch_resumes_at_the_next_epoch():
    stream = stream_of("weight")
    take(stream, len(stream))
    state = stream.state_dict()
    assert state["epoch"] == 1
    resumed = stream_of("weight")
    resumed.load_state_dict(state)
    assert len(list(resumed)) == len(stream)


def test_a_state_taken_after_the_last_batch_resumes_at_the_next_epoch():
    for kind in KINDS:
        stream = stream_of(kind)
        on_last = stream_of(kind)
        take(on_last, len(list(stream)))
        after = stream.state_dict()
        assert after["epoch"] == on_last.state_dict()["epoch"] == 1
        resumed = stream_of(kind)
        resumed.load_state_dict(through_a_file(after))
        assert_same(take(resumed, 5), take(stream, 5))
        assert resumed.metrics()["flow/tau"] == stream.metrics()["flow/tau"]


def test_losses_that_were_not_needed_are_taken_once_they_are():
    uniform: dict[str, object] = {"window": 4, "policy": fs.Uniform()}
    stream = fs.FlowStream(batches_of(gamma_losses(16 * 10)), by_key, **uniform)
    take(stream, 2)
    resumed = fs.FlowStream(batches_of(gamma_losses(16 * 10)), by_key, include=("loss",), **uniform)
    resumed.load_state_dict(through_a_file(stream.state_dict()))
    for batch in resumed:
        assert torch.equal(batch["flow_loss"], batch["loss"])


def test_taking_a_state_changes_nothing():
    plain, asked = stream_of("thin"), stream_of("thin")
    expected, out = list(plain), []
    for batch in asked:
        out.append(batch)
        asked.state_dict()
        asked.metrics()
    assert_same(out, expected)


class Counting:
    """A function of a batch that counts its calls."""

    num_scored = 0

    def __call__(self, batch):
        self.num_scored += 1
        return batch["loss"]


def test_losses_of_the_window_in_flight_are_not_scored_again():
    scorer = Counting()

    def stream() -> fs.FlowStream:
        temperature = fs.RunningMedian(warmup_samples=8)
        loader = batches_of(gamma_losses(16 * 16))
        return fs.FlowStream(loader, fs.FunctionScorer(scorer), window=8, temperature=temperature)

    expected = list(stream())
    stopped = stream()
    take(stopped, 4)
    scorer.num_scored = 0
    resumed = stream()
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    iterator = iter(resumed)
    assert_same([next(iterator)], expected[4:5])
    assert scorer.num_scored == 0
    assert_same(list(iterator), expected[5:])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"window": 8}, "window"),
        ({"mode": "resample"}, "mode"),
        ({"policy": fs.Probability()}, "policy"),
        ({"temperature": fs.RunningMedian(quantile=0.4)}, "temperature"),
        ({"normalize": True}, "normalize"),
        ({"accumulate": 2}, "accumulate"),
        ({"temperature": fs.FixedTemperature(1.0)}, "temperature"),
        ({"mode": fs.Thin(0.5)}, "mode"),
        ({"mode": "resample", "recollate": default_collate}, "mode"),
        ({"max_window_bytes": 2**20}, "max_window_bytes"),
    ],
)
def test_a_state_of_another_configuration_is_refused_naming_the_field(change, field):
    settings = {"window": 4}
    stream = fs.FlowStream(batches_of(gamma_losses(100)), by_key, **settings)
    next(iter(stream))
    other = fs.FlowStream(batches_of(gamma_losses(100)), by_key, **(settings | change))
    with pytest.raises(ValueError, match=f"the state was taken with {field}=.*strict=False"):
        other.load_state_dict(stream.state_dict())


def test_a_state_of_another_version_or_reference_is_refused():
    stream = fs.FlowStream(batches_of(gamma_losses(100)), by_key)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(ValueError, match="the state has version 99"):
        stream.load_state_dict(state | {"version": 99}, strict=False)
    other = fs.FlowStream(batches_of(gamma_losses(100)), fs.Prescored("loss"))
    with pytest.raises(ValueError, match="another reference"):
        other.load_state_dict(state)
    level = state | {"settings": state["settings"] | {"level": "token"}}
    with pytest.raises(ValueError, match="the state was taken with level=token, this stream has level=sample"):
        stream.load_state_dict(level)
    other.load_state_dict(state, strict=False)
    assert len(list(other)) == 6


def test_a_shorter_loader_is_told():
    stream = fs.FlowStream(batches_of(gamma_losses(16 * 40)), by_key, window=4, temperature=fs.FixedTemperature(1.0))
    take(stream, 30)
    shorter = fs.FlowStream(batches_of(gamma_losses(16 * 9)), by_key, window=4, temperature=fs.FixedTemperature(1.0))
    shorter.load_state_dict(stream.state_dict())
    with pytest.raises(RuntimeError, match="resume with the loader"):
        next(iter(shorter))


def test_set_epoch_does_not_drop_a_loaded_state_silently():
    stream = stream_of("weight")
    take(stream, 25)
    resumed = stream_of("weight")
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(1)
    with pytest.raises(ValueError, match=r"set_epoch\(4\) would drop the loaded state"):
        resumed.set_epoch(4)
    assert_same(take(resumed, 1), take(stream_of("weight"), 26)[25:])


class Interrupted:
    """A loader in whose pull of batch `at` the user presses Ctrl-C."""

    def __init__(self, batches, at: int) -> None:
        self.batches, self.at = batches, at

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.at:
                raise KeyboardInterrupt
            yield batch


def test_ctrl_c_loses_nothing_of_the_state():
    batches = batches_of(gamma_losses(16 * 40))
    arguments = {"window": 4, "temperature": fs.FixedTemperature(1.0)}
    stream = fs.FlowStream(Interrupted(batches, 22), by_key, **arguments)
    out = []
    with pytest.raises(KeyboardInterrupt):
        for batch in stream:
            out.append(batch["id"])
    assert 0 < len(out) < 22
    resumed = fs.FlowStream(batches, by_key, **arguments)
    resumed.load_state_dict(through_a_file(stream.state_dict()))
    assert torch.equal(torch.cat([*out, *(batch["id"] for batch in resumed)]), torch.arange(16 * 40))


@pytest.mark.parametrize("num", [1, 25, 400])
@pytest.mark.parametrize("backend", ["numpy", "tdigest"])
@pytest.mark.parametrize("mode", ["weight", "resample", fs.Systematic(2.0)], ids=str)
def test_a_state_of_windows_of_512_samples_is_small(mode, backend, num):
    temperature = fs.RunningMedian(backend=backend)
    stream = fs.FlowStream(batches_of(gamma_losses(40_000)), by_key, mode=mode, window=32, temperature=temperature)
    take(stream, num)
    state = stream.state_dict()
    (position,) = state["position"]
    buffer = io.BytesIO()
    torch.save(state | {"position": ({**position, "source": None},)}, buffer)
    assert buffer.tell() < 64 * 1024


NEW_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_state
found = {}
for kind, state in torch.load(sys.argv[2], weights_only=True).items():
    stream = test_state.stream_of(kind)
    stream.load_state_dict(state)
    found[kind] = test_state.take(stream, 6)
torch.save(found, sys.argv[3])
"""


def test_a_new_process_resumes_to_the_bit(tmp_path, request):
    states, expected = {}, {}
    for kind, stop in (("weight", 9), ("thin", 7), ("tdigest", 13)):
        expected[kind] = take(stream_of(kind), stop + 6)[stop:]
        stream = stream_of(kind)
        take(stream, stop)
        states[kind] = stream.state_dict()
    torch.save(states, tmp_path / "states.pt")
    tests = str(request.config.rootpath / "tests")
    command = [sys.executable, "-c", NEW_PROCESS, tests, str(tmp_path / "states.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for kind, rest in expected.items():
        assert_same(found[kind], rest)


# -- a resume that does not go well ----------------------------------------------------------------


class Flaky:
    """Raises `error` once, at batch `at` of the pass number `on`, and goes on if it can be asked again."""

    def __init__(self, batches, at: int, error: type[BaseException], on: int = 0, again: bool = False) -> None:
        self.batches, self.at, self.error, self.on, self.again = batches, at, error, on, again
        self.num_passes = 0

    def __iter__(self):
        self.num_passes += 1
        fails = self.again or self.num_passes - 1 == self.on
        return FlakyIterator(iter(self.batches), self.at if fails else -1, self.error)


class FlakyIterator:
    def __init__(self, rest, at, error) -> None:
        self.rest, self.at, self.error, self.count = rest, at, error, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count == self.at + 1:
            raise self.error("once")
        return next(self.rest)


FIXED = {"window": 4, "temperature": fs.FixedTemperature(1.0)}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 5, 21, 23, 26])
def test_a_resume_that_fails_keeps_its_position_and_may_be_tried_again(error, at):
    batches = batches_of(gamma_losses(16 * 40))
    stream = fs.FlowStream(batches, by_key, **FIXED)
    taken = take(stream, 22)
    resumed = fs.FlowStream(Flaky(batches, at, error), by_key, **FIXED)
    resumed.load_state_dict(stream.state_dict())
    iterator = iter(resumed)
    with pytest.raises(error):
        for batch in iterator:
            taken.append(batch)
    again = fs.FlowStream(batches, by_key, **FIXED)
    again.load_state_dict(through_a_file(resumed.state_dict()))
    assert torch.equal(next(iter(again))["id"], batches[len(taken)]["id"])
    taken += list(iterator)
    assert torch.equal(torch.cat([batch["id"] for batch in taken]), torch.arange(16 * 40))


def test_an_error_that_was_passed_over_is_passed_over_again_on_resume():
    batches = batches_of(gamma_losses(16 * 40))
    stream = fs.FlowStream(Flaky(batches, 5, OSError, again=True), by_key, **FIXED)
    iterator, taken = iter(stream), []
    with pytest.raises(OSError, match="once"):
        for batch in iterator:
            taken.append(batch)
    taken += [next(iterator) for _ in range(16)]
    resumed = fs.FlowStream(Flaky(batches, 5, OSError, again=True), by_key, **FIXED)
    resumed.load_state_dict(through_a_file(stream.state_dict()))
    assert torch.equal(torch.cat([batch["id"] for batch in taken + list(resumed)]), torch.arange(16 * 40))


def test_a_loader_that_delivers_other_batches_is_told_and_its_losses_are_taken_anew(caplog):
    losses = gamma_losses(16 * 40)
    stream = fs.FlowStream(batches_of(losses), by_key, include=("loss",), **FIXED)
    take(stream, 10)
    shuffled = batches_of(losses)
    torch.manual_seed(0)
    shuffled = [shuffled[i] for i in torch.randperm(40).tolist()]
    resumed = fs.FlowStream(shuffled, by_key, include=("loss",), **FIXED)
    resumed.load_state_dict(stream.state_dict())
    for batch in resumed:
        assert torch.equal(batch["flow_loss"], batch["loss"])
    assert "delivers another batch 8 than before" in caplog.text


def test_a_closed_stream_still_has_its_state():
    with stream_of("weight") as stream:
        taken = take(stream, 9)
    resumed = stream_of("weight")
    resumed.load_state_dict(stream.state_dict())
    assert_same(taken + take(resumed, 3), take(stream_of("weight"), 12))


def test_a_refused_state_leaves_the_stream_as_it_was():
    stream = stream_of("weight")
    iterator = iter(stream)
    first = [next(iterator) for _ in range(5)]
    with pytest.raises(ValueError, match="seed"):
        other = {"window": 4, "accumulate": 2, "temperature": fs.RunningMedian(warmup_samples=96)}
        stream.load_state_dict(fs.FlowStream([], by_key, seed=9, **other).state_dict())
    with pytest.raises(ValueError, match="the state has no 'running'"):
        stream.load_state_dict({key: value for key, value in stream.state_dict().items() if key != "running"})
    assert_same(first + list(iterator), list(stream_of("weight")))


def test_another_temperature_may_take_over_when_that_is_meant(caplog):
    stream = stream_of("weight")
    take(stream, 9)
    other = fs.FlowStream(batches_of(gamma_losses(16 * 21 + 5)), by_key, window=4, temperature=fs.FixedTemperature(2.0))
    other.load_state_dict(stream.state_dict(), strict=False)
    assert "τ begins anew" in caplog.text
    batch = next(iter(other))
    torch.testing.assert_close(batch["flow_weight"], torch.exp(-batch["loss"] / 2.0))


def test_capped_windows_keep_a_steps_batches_together():
    losses = torch.where(torch.rand(16 * 600, generator=torch.Generator().manual_seed(0)) < 0.01, 0.0, 300.0)
    stream = fs.FlowStream(batches_of(losses), by_key, mode="resample", include=("denominator",), accumulate=4, **FIXED)
    denominators = [float(batch["flow_denominator"]) for batch in stream]
    sizes = [
        len(batch["id"]) for batch in fs.FlowStream(batches_of(losses), by_key, mode="resample", accumulate=4, **FIXED)
    ]
    for first in range(0, len(sizes), 4):
        assert set(denominators[first : first + 4]) == {float(sum(sizes[first : first + 4]))}
