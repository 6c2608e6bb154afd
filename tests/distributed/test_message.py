"""What a rank tells the others of a window, and what all make of it: pure, so without any rank."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstream.digest import Digest
from flowstream.distributed.message import MAX_STEPS, Message, Phase, UnevenError, agree, failed
from flowstream.metrics import WeightSums


def digest_of(values: list[float]) -> Digest:
    digest = Digest()
    digest.add(np.array(values))
    return digest


unsigned = st.integers(0, 2**32 - 1)
counted = st.integers(0, 2**62)
sums = st.builds(WeightSums, *[st.floats(0, 1e15)] * 7)
digests = st.lists(st.floats(0, 1e6), max_size=600).map(digest_of)
messages = st.builds(
    Message,
    phase=st.sampled_from(Phase),
    generation=unsigned,
    epoch=counted,
    window=counted,
    position=counted,
    configuration=st.integers(0, 2**64 - 1),
    tau=st.floats(0, 1e6) | st.just(math.nan),
    has_batch=st.booleans(),
    size=unsigned,
    num_first=unsigned,
    num_first_bytes=counted,
    num_batches=unsigned,
    ended=st.booleans(),
    num_seen=counted,
    num_kept=counted,
    content=st.integers(0, 2**64 - 1),
    sums=sums,
    counts=st.lists(unsigned, max_size=20).map(tuple),
    digest=digests,
    failure=st.text(max_size=300).map(lambda text: text.replace("\0", "")),
)


@settings(max_examples=50)
@given(messages, st.sampled_from([20, 100, MAX_STEPS]))
def test_a_message_comes_out_as_it_went_in(message, max_steps):
    sent = message.to_bytes(max_steps)
    assert len(sent) == Message.num_bytes(max_steps)
    received = Message.from_bytes(sent, max_steps)
    for name in Message.__dataclass_fields__:
        ours, theirs = getattr(message, name), getattr(received, name)
        if name == "digest":
            assert theirs.to_bytes() == ours.to_bytes()
        elif name == "failure":
            assert ours.encode()[:400].decode(errors="replace") == theirs
        else:
            assert repr(theirs) == repr(ours)


def test_a_message_has_one_size_and_that_is_at_most_16_kilobytes():
    full = Message(phase=Phase.WINDOW, counts=(2**32 - 1,) * MAX_STEPS, digest=digest_of(list(range(100_000))))
    failure = failed(full, ValueError("é" * 10_000))
    for max_steps in (0, MAX_STEPS):
        own = replace(full, counts=full.counts[:max_steps])
        sizes = {
            len(one.to_bytes(max_steps)) for one in (own, replace(failure, counts=()), Message(phase=Phase.LOSSES))
        }
        assert sizes == {Message.num_bytes(max_steps)}
    assert Message.num_bytes(0) <= Message.num_bytes(MAX_STEPS) <= 16_384


@given(st.lists(st.integers(-(2**60), 2**60), max_size=8).map(tuple))
def test_tallies_are_told_and_added_up(tallies):
    message = Message(phase=Phase.WINDOW, counts=(3,), digest=digest_of([1.0, 2.0]), tallies=tallies)
    sent = message.to_bytes(1, num_tallies=len(tallies))
    assert len(sent) == Message.num_bytes(1, len(tallies)) == Message.num_bytes(1) + 8 * len(tallies)
    received = Message.from_bytes(sent, 1, len(tallies))
    assert (received.tallies, received.counts, received.digest.num_values) == (tallies, (3,), 2)
    assert agree([received, received], on_uneven="pad").tallies == tuple(2 * tally for tally in tallies)
    assert len(Message(phase=Phase.OPENING).to_bytes(1, num_tallies=len(tallies))) == len(sent)


def test_what_is_no_message_or_too_long_a_window_is_refused():
    message = Message(phase=Phase.WINDOW, counts=(1, 2, 3))
    with pytest.raises(ValueError, match="window of 3 optimizer steps, but a message holds 2"):
        message.to_bytes(2)
    sent = message.to_bytes(3)
    for wrong in (sent[:-1], sent + b"\0", b"????" + sent[4:], b""):
        with pytest.raises(ValueError, match="are no message"):
            Message.from_bytes(wrong, 3)


def test_a_failure_says_what_it_was():
    told = failed(Message(phase=Phase.WINDOW, window=3), OSError("shard-0007.tar is torn"))
    received = Message.from_bytes(told.to_bytes(0), 0)
    assert received.phase is Phase.FAILURE
    assert (received.window, received.failure) == (3, "OSError: shard-0007.tar is torn")


# What follows from all messages.

brought = st.builds(
    Message,
    phase=st.just(Phase.WINDOW),
    num_batches=st.integers(0, 12),
    ended=st.booleans(),
    num_seen=st.integers(0, 100),
    num_kept=st.integers(0, 100),
    counts=st.lists(st.integers(0, 1000), max_size=6).map(tuple),
    sums=sums,
    digest=st.lists(st.floats(0, 100), max_size=30).map(digest_of),
)
ranks = st.lists(brought, min_size=1, max_size=6)


@given(ranks, st.sampled_from(["pad", "stop", "raise"]), st.integers(1, 4))
def test_ranks_agree_as_a_plain_account_says(told, on_uneven, accumulate):
    batches = [message.num_batches for message in told]
    if on_uneven == "raise" and len(set(batches)) > 1:
        with pytest.raises(UnevenError):
            agree(told, on_uneven=on_uneven, accumulate=accumulate)
        return
    agreed = agree(told, on_uneven=on_uneven, accumulate=accumulate)
    stops = on_uneven == "stop"
    over = {rank for rank, message in enumerate(told) if message.ended}
    assert set(agreed.ended) == over - (
        {at for at, num in enumerate(batches) if num > min(batches)} if stops else set()
    )
    assert agreed.world_size == len(told)
    if stops:
        assert agreed.last == bool(agreed.ended)
        assert agreed.num_padded == 0
        # A step that has all its batches on every rank is taken; one that has not, only as the last of all ranks.
        whole = min(batches) // accumulate * accumulate
        is_short_everywhere = len(set(batches)) == 1 and agreed.last
        assert agreed.num_deliveries == (min(batches) if is_short_everywhere else whole)
    else:
        assert agreed.last == (len(over) == len(told))
        assert agreed.num_deliveries == max(batches)
        assert agreed.num_padded == sum(max(batches) - num for num in batches)
    assert agreed.num_seen == sum(message.num_seen for message in told)
    assert agreed.num_kept == sum(message.num_kept for message in told)
    for step in range(max(len(message.counts) for message in told)):
        assert agreed.counts[step] == sum((*message.counts, *[0] * 10)[step] for message in told)
    assert agreed.sums.total == pytest.approx(sum(message.sums.total for message in told))
    assert agreed.sums.num == pytest.approx(sum(message.sums.num for message in told))
    values = np.concatenate([message.digest.means for message in told])
    assert agreed.digest.num_values == len(values)
    if len(values):
        assert agreed.digest.quantile(0.5) == pytest.approx(np.median(values))


def test_uneven_ranks_are_named():
    told = [Message(phase=Phase.WINDOW, window=5, epoch=2, num_batches=num) for num in (4, 3, 4, 0)]
    with pytest.raises(UnevenError, match=r"window 5 of epoch 2 ranks \[1, 3\] have \[3, 0\] batches .* have 4"):
        agree(told, on_uneven="raise")
