"""The ranks' meeting in real processes: what is said arrives everywhere, and who does not come is named everywhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import Outcome, run_ranks
from torch.distributed import init_device_mesh
from torch.distributed.device_mesh import DeviceMesh

from flowstream.distributed.agreement import Agreement
from flowstream.distributed.blame import storeless
from flowstream.distributed.peers import Peers
from flowstream.distributed.rank_error import RankError
from flowstream.distributed.store_line import StoreLine
from flowstream.distributed.world import World

NUM_BYTES = 100
SAME = {"seed": "0", "mode": "weight"}


def agreement_of(world: World | None = None, *, timeout: float = 30.0, num_bytes: int = NUM_BYTES) -> Agreement:
    return Agreement(world or World.of(), timeout=timeout, num_bytes=num_bytes)


def message(rank: int, number: int) -> bytes:
    return bytes([rank, number]) * (NUM_BYTES // 2)


def results(outcomes: list[Outcome]) -> list[Any]:
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    return [outcome.result for outcome in outcomes]


def errors(outcomes: list[Outcome], kind: str, but: tuple[int, ...] = ()) -> list[str]:
    found = {rank: outcome for rank, outcome in enumerate(outcomes) if rank not in but}
    assert all(outcome.error is not None and outcome.error.type == kind for outcome in found.values()), found
    return [outcome.error.text for outcome in found.values() if outcome.error]


# Alone.


def test_a_world_of_one_agrees_with_itself():
    agreement = Agreement(World(), timeout=1.0, num_bytes=3)
    agreement.shake_hands(SAME)
    agreement.note("batch 0")
    assert not agreement.started
    agreement.start(b"abc", "window 0")
    assert agreement.started
    assert agreement.wait() == [b"abc"]
    assert not agreement.started
    assert agreement.gather(3) == [3]
    assert agreement.broadcast({"a": 1}, 0) == {"a": 1}
    losses = torch.rand(4)
    peers = Peers(World(), timeout=1.0)
    assert peers.agree(losses) is losses
    peers.close()
    agreement.close()


def test_what_cannot_be_sent_is_refused():
    agreement = Agreement(World(), timeout=1.0, num_bytes=3)
    with pytest.raises(ValueError, match="4 bytes was given to an agreement on 3"):
        agreement.start(b"abcd", "window 0")
    with pytest.raises(RuntimeError, match="no meeting was started"):
        agreement.wait()


def test_a_rank_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(RankError("rank 2 has died", [2])))
    assert (str(error), error.ranks) == ("rank 2 has died", (2,))


# Together.


def meet_often() -> dict[str, Any]:
    world = World.of()
    agreement, other = agreement_of(), Agreement(world, timeout=30.0, num_bytes=1)
    found: dict[str, Any] = {"numbers": agreement.gather(world.rank * 10)}
    agreement.shake_hands(SAME)
    other.shake_hands({"seed": "another stream"})
    found["messages"], found["others"] = [], []
    for number in range(20):  # two streams, whose meetings overlap
        agreement.note(f"batch {number}")
        agreement.start(message(world.rank, number), f"window {number}")
        other.start(bytes([100 + world.rank]), f"window {number}")
        found["messages"].append(agreement.wait())
        found["others"].append(other.wait())
    agreement.start(message(world.rank, 98), "abandoned")
    agreement.start(message(world.rank, 99), "begun anew")
    found["after abandoning"] = agreement.wait()
    found["values"] = [agreement.broadcast(["from", world.rank] if world.rank == 2 else None, 2)]
    try:
        agreement.broadcast(lambda: None, 1)
    except RuntimeError as error:
        found["unpicklable"] = str(error)
    agreement.start(message(world.rank, 97), "given up with the stream")
    began = time.monotonic()
    agreement.close()
    agreement.close()
    dist.destroy_process_group()
    other.close()
    found["closing seconds"] = time.monotonic() - began
    try:
        agreement.start(message(0, 0), "closed")
    except RuntimeError as error:
        found["closed"] = str(error)
    return found


def test_what_every_rank_says_arrives_at_all_in_their_order():
    for found in results(run_ranks(meet_often, 3)):
        assert found["numbers"] == [0, 10, 20]
        assert found["messages"] == [[message(rank, number) for rank in range(3)] for number in range(20)]
        assert found["others"] == [[bytes([100 + rank]) for rank in range(3)]] * 20
        assert found["after abandoning"] == [message(rank, 99) for rank in range(3)]
        assert found["values"] == [["from", 2]]
        assert "rank 1 has to share cannot be pickled" in found["unpicklable"]
        assert found["closing seconds"] < 5
        assert "is closed" in found["closed"]


def meet_on_meshes() -> Any:
    flat = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "shard", "tp"))
    flat["replicate", "shard"]._flatten("dp")
    assert agreement_of(World.of(flat["dp"])).gather(dist.get_rank()) == [0, 1, 2, 3]
    mesh = DeviceMesh("cpu", [[3, 1], [2, 0]], mesh_dim_names=("dp", "tp"))
    world = World.of(mesh["dp"])
    agreement = agreement_of(world)
    agreement.shake_hands(SAME)
    agreement.start(message(dist.get_rank(), 0), "window 0")
    told = [said[0] for said in agreement.wait()]
    peers = Peers(world, timeout=30.0)
    losses = torch.arange(5.0) + 10 * dist.get_rank()
    shared = [peers.agree(losses), peers.agree(losses.half()), peers.agree(losses[:0])]
    try:
        peers.agree(losses[: 2 + dist.get_rank()])
    except RuntimeError as error:
        mismatch = str(error)
    peers.close()
    agreement.close()
    return world.ranks, told, world.peers, [part.tolist() for part in shared], [str(s.dtype) for s in shared], mismatch


def test_the_ranks_of_a_mesh_meet_in_its_order_and_its_peers_share_the_losses_of_the_first():
    found = results(run_ranks(meet_on_meshes, 4))
    for rank, (ranks, told, peers, shared, dtypes, mismatch) in enumerate(found):
        assert ranks == ((3, 2) if rank in (3, 2) else (1, 0))
        assert told == list(ranks)
        assert peers == ((3, 1) if rank in (3, 1) else (2, 0))
        first = [10.0 * peers[0] + i for i in range(5)]
        assert shared == [first, first, []]
        assert dtypes == ["torch.float32", "torch.float16", "torch.float32"]
        nums = " of 4 bytes, ".join(str(min(2 + peer, 5)) for peer in peers)
        assert f"different samples: {nums} of 4 bytes losses, on global ranks {list(peers)}" in mismatch


def build_again_and_again(num: int) -> Any:
    counts, seconds = [], []
    for number in range(num):
        began = time.monotonic()
        agreement = agreement_of()
        assert agreement.gather(number) == [number] * 2
        agreement.close()
        del agreement
        seconds.append(time.monotonic() - began)
        counts.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    open_ones = [agreement_of() for _ in range(10)]
    assert [one.gather(number) for number, one in enumerate(open_ones)] == [[number] * 2 for number in range(10)]
    lines = [thread for thread in threading.enumerate() if thread.name == "flowstream talks to the store"]
    return counts, len(lines), max(seconds)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads and sockets are counted in /proc")
def test_streams_built_after_each_other_leave_no_threads_or_sockets_and_share_a_line_to_the_store():
    for counts, num_lines, _ in results(run_ranks(build_again_and_again, 2, 60)):
        for early, late in zip(counts[4], counts[-1], strict=True):  # each would leave 3 threads and 5 sockets
            assert late <= early + 20
        assert num_lines == 1


def meet_anew() -> list[list[int]]:
    """In a process group, and in another one in its place; and in a process that was forked."""
    rank, found = dist.get_rank(), []
    store = dist.group.WORLD.get_group_store()
    port = int(store.get("port")) if rank else 0
    if rank == 0:
        kept = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        port = kept.port
        store.set("port", str(port))
    agreement = agreement_of()
    found.append(agreement.gather(rank))
    pid = os.fork()
    if not pid:
        agreement.note("in a fork")
        agreement.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    agreement.shake_hands(SAME)
    found.append(agreement.gather(rank))
    dist.destroy_process_group()
    new = dist.TCPStore("127.0.0.1", port, None, False)
    dist.init_process_group("gloo", store=new, rank=rank, world_size=2)
    other = agreement_of()
    other.shake_hands(SAME)
    found += [agreement.gather(rank), other.gather(rank)]
    return found


def test_streams_outlive_a_fork_and_meet_in_a_process_group_that_took_the_place_of_another():
    assert results(run_ranks(meet_anew, 2)) == [[[0, 1]] * 4] * 2


# The handshake.


def shake_hands(cases: list[list[dict[str, str]]]) -> list[str]:
    found = []
    for configurations in cases:
        with pytest.raises(ValueError, match="differ in") as raised:
            agreement_of().shake_hands(configurations[dist.get_rank()])
        found.append(str(raised.value))
    return found


def test_ranks_that_are_configured_differently_all_say_so():
    lacking = {"seed": "0"}
    for other_seed, lacks in results(
        run_ranks(shake_hands, 3, [[SAME, SAME | {"seed": "7"}, SAME], [SAME, lacking, lacking]])
    ):
        assert "differ in seed: 0 on ranks 0, 2; 7 on rank 1" in other_seed
        assert "differ in mode: weight on rank 0; missing on ranks 1, 2" in lacks


def come_late(missing: int, is_killed: bool) -> None:
    agreement = agreement_of()
    if dist.get_rank() == missing:
        time.sleep(0.2 if is_killed else 2.5)
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
    agreement.shake_hands(SAME, patience=20.0 if is_killed else 1.0)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_does_not_come_is_named_with_the_usual_causes(missing):
    outcomes = run_ranks(come_late, 3, missing, False)
    for text in errors(outcomes, "RankError"):  # also where it comes in the end
        assert f"rank {missing} did not come, of 3 ranks that wait 1 s" in text
        assert "DataLoaderDispatcher: prepare the inner loader" in text
    assert max(outcome.seconds for rank, outcome in enumerate(outcomes) if rank != missing) < 4.5


def test_a_rank_that_died_before_it_came_is_named_at_once():
    outcomes = run_ranks(come_late, 3, 2, True, expect_death=[2])
    assert max(outcome.seconds for outcome in outcomes[:2]) < 4
    for text in errors(outcomes, "RankError", but=(2,)):
        assert text.startswith("rank 2 has died, before all ranks had come: look into its output")


MEET_TIMEOUT = 8.0


def meet_first(how: str) -> None:
    """Ranks that build their streams; one does not, and another is slow."""
    rank = dist.get_rank()
    if how == "dies with the store" and rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "dies with the store, seen by one" and rank == 2:
        time.sleep(1.5)
    agreement = agreement_of(timeout=MEET_TIMEOUT)
    if rank == 0 and how == "dies with the store, seen by one":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how in ("dies, another is slow", "stops, another is slow"):
        StoreLine.of_process().ask(lambda store: None)  # its word has arrived
        os.kill(os.getpid(), signal.SIGKILL if how.startswith("dies") else signal.SIGSTOP)
    if rank == 1 and how == "raises, another is slow":
        try:
            raise OSError("no such model")
        except OSError:
            agreement.close()
        raise SystemExit
    if rank == 2 and "slow" in how:
        time.sleep(0.8 * MEET_TIMEOUT if how.startswith("stops") else 3.0)  # it comes when rank 0 has lost patience
    if rank == 2 and how == "is late":
        time.sleep(5.0)
    agreement.gather(rank, notice=1.0)


@pytest.mark.parametrize(
    ("how", "victim", "words", "host_store"),
    [
        ("dies with the store", 0, "rank 0 cannot be reached, and the store of torch.distributed is gone", "rank0"),
        ("dies with the store, seen by one", 0, "rank 0 (has died|cannot be reached), and the store", "rank0"),
        ("dies, another is slow", 1, "rank 1 has died, before all ranks had come", "rank0"),
        ("raises, another is slow", 1, "rank 1 has closed its stream after OSError: no such model, before", "rank0"),
        ("stops, another is slow", 1, "rank 1 was stopped .* before all ranks had come", "rank0"),
    ],
)
def test_a_rank_lost_before_the_first_meeting_is_named_and_no_slow_one(how, victim, words, host_store):
    outcomes = run_ranks(meet_first, 3, how, host_store=host_store, expect_death=[victim])
    for rank, text in zip({0, 1, 2} - {victim}, errors(outcomes, "RankError", but=(victim,)), strict=True):
        assert re.search(f"^{words}", text), (rank, text)
    seconds = max(outcome.seconds for rank, outcome in enumerate(outcomes) if rank != victim)
    assert seconds < MEET_TIMEOUT + (1 if how.startswith("stops") else -2)


def test_a_rank_that_builds_its_stream_late_is_waited_for_and_logged_once():
    outcomes = run_ranks(meet_first, 3, "is late")
    results(outcomes)
    printed = "".join(outcome.output for outcome in outcomes)
    assert printed.count("rank 2 did not come in 1 s to build the stream together with the other ranks") == 1
    assert "as under `if rank == 0`" in printed


# Faults.


def lose(victim: int, how: str, timeout: float) -> None:
    world = World.of()
    agreement = agreement_of(timeout=timeout)
    agreement.shake_hands(SAME)
    for number in range(3):
        agreement.note(f"window {number} of epoch 0, batch 5")
        if number == 2 and world.rank == victim:
            if how == "raising":
                raise OSError("no such shard")
            if how == "closing":
                agreement.close()
                return
            if how == "sleeping":
                time.sleep(timeout + 3)
                return
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        agreement.start(message(world.rank, number), f"window {number} of epoch 0, batch 5")
        agreement.wait()


FATES = {
    "killed": "has died",
    "stopped": "was stopped",
    "raising": "(has closed its stream|has died)",
    "closing": "has closed its stream",
    "sleeping": "has not called next\\(\\) since",
}


@pytest.mark.parametrize(
    ("victim", "how", "host_store"),
    [
        (2, "killed", "parent"),
        (0, "killed", "rank0"),  # and with it the store
        (2, "stopped", "parent"),
        (0, "stopped", "rank0"),
        (1, "raising", "parent"),
        (2, "closing", "rank0"),
        (1, "sleeping", "parent"),
    ],
)
def test_a_rank_that_is_lost_is_named_on_every_other(victim, how, host_store):
    timeout = 4.0
    outcomes = run_ranks(lose, 3, victim, how, timeout, host_store=host_store, expect_death=[victim])
    for text in errors(outcomes, "RankError", but=(victim,)):
        found = re.search(rf"waited in vain: rank {victim} {FATES[how]}", text)
        assert found, text
        assert ("restart all ranks" in text) or ("close together" in text), text
        if not (victim == 0 and host_store == "rank0"):  # nobody is left to tell where it was
            assert "window 1 of epoch 0, batch 5" in text
    assert max(outcome.seconds for rank, outcome in enumerate(outcomes) if rank != victim) < timeout + 1


def call_in_late() -> None:
    agreement = agreement_of(timeout=20.0)
    agreement.shake_hands(SAME)
    agreement.note("window 0")
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 2:
        time.sleep(2.5)  # a long training step, while the others find out
    agreement.start(message(0, 0), "window 0")
    agreement.wait()


def test_a_rank_that_calls_in_after_the_failure_says_the_same():
    outcomes = run_ranks(call_in_late, 4, expect_death=[3])
    for text in errors(outcomes, "RankError", but=(3,)):
        assert "waited in vain: rank 3 has died" in text


def fail_twice() -> list[tuple[str, tuple[int, ...]]]:
    agreement = agreement_of(timeout=4.0)
    agreement.shake_hands(SAME)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = []
    for _ in range(2):
        try:
            agreement.start(message(0, 0), "window 0")
            agreement.wait()
        except RankError as error:
            found.append((str(error), error.ranks))
    agreement.close()
    return found


def test_a_stop_is_the_first_cause_where_the_store_went_after_it():
    fates = {0: "has died", 1: "was stopped (by SIGSTOP or a debugger)"}
    verdict = storeless(["rank 0", "rank 1", "rank 2"], fates, [0], "is gone")
    assert verdict.ranks == (1,)
    assert verdict.text.startswith("rank 1 was stopped (by SIGSTOP or a debugger), and the store of torch.")
    assert "; rank 0 has died, maybe because of that: look into" in verdict.text


def test_after_a_failure_every_call_says_the_same():
    first, second = run_ranks(fail_twice, 2, expect_death=[1])[0].result
    assert first == second
    assert first[1] == (1,)


def evaluate_for_long() -> tuple[list[bytes], float]:
    rank, agreement = dist.get_rank(), agreement_of(timeout=8.0)
    agreement.shake_hands(SAME)
    if rank == 0:
        time.sleep(2.0)
    agreement.start(message(rank, 0), "window 0")
    met = agreement.wait()
    began = time.monotonic()
    if rank == 0:
        agreement.start(message(0, 0), "window 1")
        agreement.close()
    else:
        time.sleep(4.0)
    return met, time.monotonic() - began


def test_a_long_evaluation_on_one_rank_is_not_a_death_and_closing_does_not_wait_for_a_rank_that_never_comes():
    found = results(run_ranks(evaluate_for_long, 2))
    assert [met for met, _ in found] == [[message(0, 0), message(1, 0)]] * 2
    assert found[0][1] < 3.9


def meet_beside_a_stopped_store() -> tuple[list[list[int]], float, str, tuple[int, ...]]:
    """Rank 0 keeps the store, and is none of those that meet."""
    rank, pair = dist.get_rank(), dist.new_group([1, 2])
    store = dist.group.WORLD.get_group_store()
    if rank == 0:
        store.set("keeper", str(os.getpid()))
        signal.pause()
    keeper = int(store.get("keeper"))
    first, second = (agreement_of(World.of(pair), timeout=timeout) for timeout in (4.0, 30.0))
    found = [first.gather(rank)]
    if rank == 1:
        os.kill(keeper, signal.SIGSTOP)
        threading.Timer(6.0, os.kill, (keeper, signal.SIGCONT)).start()
    first.note("beside a store that does not answer")
    found.append(first.gather(rank))
    began = time.monotonic()
    found.append(second.gather(rank))
    waited = time.monotonic() - began
    if rank == 1:
        os.kill(keeper, signal.SIGSTOP)
    found.append(first.gather(rank))
    if rank == 2:
        time.sleep(5.5)
        return found, waited, "", ()
    with pytest.raises(RankError) as raised:
        first.gather(rank)
    return found, waited, str(raised.value), raised.value.ranks


def test_a_store_that_hangs_delays_but_no_rank_is_named_for_it():
    outcomes = run_ranks(meet_beside_a_stopped_store, 3, host_store="rank0", expect_death=[0])[1:]
    for found, waited, text, ranks in results(outcomes):
        assert found == [[1, 2]] * 4
        assert waited > 3  # `first` met at once, `second` once the store went on
        assert ranks == ()
        assert text == "" or "the store of torch.distributed does not answer" in text
    assert outcomes[0].result[2]


ENDING = """
import datetime, os, sys, time
import torch.distributed as dist
from flowstream.distributed.agreement import Agreement
from flowstream.distributed.world import World
cases = [("raises", 0), ("raises", 1), ("ends", 0), ("ends", 1), ("destroys", 0), ("destroys", 1)]
children = {}
for (how, rank), port in zip(cases, sys.argv[2:]):  # torch is imported once; from its fork on, each is its own script
    pid = os.fork()
    if not pid:
        break
    children[pid] = f"{how}-{rank}"
else:
    for _ in cases:
        pid, status = os.wait()
        print(children[pid], os.waitstatus_to_exitcode(status))
    os._exit(0)
os.dup2(os.open(f"{sys.argv[1]}/{how}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
store = dist.TCPStore("127.0.0.1", int(port), None, False, datetime.timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
agreement = Agreement(World.of(), timeout=600.0, num_bytes=4)
agreement.shake_hands({})
if how == "raises":
    if rank == 1:
        time.sleep(2.0)
        for place in ("window 0 of epoch 0, batch 7", "window 1 of epoch 0, batch 7"):  # the first was met by both
            agreement.start(b"late", place)
            agreement.wait()
    agreement.start(b"word", "window 0 of epoch 0, batch 7")
    raise OSError("no such shard")
agreement.start(b"word", "window 0 of epoch 0, batch 7")
agreement.wait()
agreement.start(b"word", "window 1 of epoch 0, batch 7")
if how == "destroys":
    dist.destroy_process_group()
"""


def test_scripts_that_end_without_closing_neither_hang_nor_warn_and_one_that_failed_is_named(tmp_path: Path):
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in range(3)]
    ports = [str(store.port) for store in stores for _ in range(2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script, tmp_path, *ports],
        stdout=subprocess.PIPE,
        env=environment,
        timeout=60,
        text=True,
    )
    codes = dict(line.split() for line in ended.stdout.splitlines())
    told = {name: (tmp_path / name).read_text() for name in codes}
    assert codes == {name: "1" if "raises" in name else "0" for name in codes}, told
    assert len(codes) == 6
    assert told["raises-0"].rstrip().endswith("OSError: no such shard")
    assert re.search(
        "RankError: .*rank 0 (has ended without closing its stream after OSError: no such shard)", told["raises-1"]
    )
    assert [text for name, text in told.items() if "raises" not in name] == [""] * 4
