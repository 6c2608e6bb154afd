"""Reading ahead: what is pulled, when, and where the loader stood."""

from __future__ import annotations

import pytest
from batches import Recording

from flowstream.read_ahead import ReadAhead
from flowstream.sources.replay import replayed


def reader_of(batches) -> ReadAhead:
    reader = ReadAhead(replayed(batches))
    reader.start()
    return reader


def test_batches_come_in_order_with_their_ordinals_queued_or_not():
    reader = reader_of("abcd")
    reader.pull()
    reader.pull()
    assert reader.num_queued == 2
    assert reader.next_ordinal == 0
    taken = [reader.take() for _ in range(4)]
    assert [(item.batch, item.ordinal) for item in taken] == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert reader.take() is None
    assert reader.exhausted


def test_an_error_waits_behind_the_batches_before_it_and_is_raised_once():
    class Once:
        count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            if self.count == 3:
                raise OSError("torn")
            if self.count > 5:
                raise StopIteration
            return self.count

    reader = reader_of(Once())
    while reader.pull():
        pass
    assert reader.stopped
    assert not reader.exhausted
    reader.reraise()  # not yet: two batches are queued
    assert [reader.take().batch for _ in range(2)] == [1, 2]
    assert reader.take() is None
    with pytest.raises(OSError, match="torn") as caught:
        reader.reraise("epoch 7")
    assert caught.value.__notes__ == ["raised by the loader at batch 2 of epoch 7"]
    assert [reader.take().batch for _ in range(2)] == [4, 5]
    assert reader.take() is None
    assert reader.exhausted


@pytest.mark.parametrize("snapshot_every", [1, 3])
@pytest.mark.parametrize("ordinal", range(9))
def test_any_batch_is_reached_again_from_its_state(ordinal, snapshot_every):
    reader = reader_of(range(9))
    reader.snapshot_every = snapshot_every
    while reader.pull():
        pass
    state = reader.state_for(ordinal)
    assert ordinal - snapshot_every < state["ordinal"] <= ordinal
    again = ReadAhead(replayed(range(9)))
    again.resume(state, ordinal)
    assert again.next_ordinal == ordinal
    assert again.take().batch == ordinal


def test_a_loader_that_became_shorter_is_told():
    reader = reader_of(range(9))
    reader.snapshot_every = 4
    while reader.pull():
        pass
    state = reader.state_for(4)
    with pytest.raises(RuntimeError, match="the loader ended after 2 batches, but the state was taken after 4"):
        ReadAhead(replayed(range(2))).resume(state, 4)
    with pytest.raises(RuntimeError, match="the loader ended at batch 4, but the state needs batch 6"):
        ReadAhead(replayed(range(4))).resume(state, 6)


def test_nothing_is_asked_of_the_loader_before_the_start():
    loader = Recording([1, 2, 3])
    ReadAhead(replayed(loader))
    assert loader.num_pulled == 0
