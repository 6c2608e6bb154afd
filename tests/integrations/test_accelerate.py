"""Loops under accelerate: what they train to, where they step, what they save, beside loops written by hand."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from conftest import build
from safetensors.torch import load_file
from spawned import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchrun import torchrun

import flowstream as fs
from flowstream.integrations.accelerate import prepare

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
TAU = 3.0
NUM, BATCH = 90, 4
"""23 batches, the last of two samples: an epoch ends in the third of four micro-batches."""

Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _a_new_accelerator() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def texts(num: int = NUM) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(num):
        ids = torch.randint(3, 97, (int(torch.randint(5, 14, (1,), generator=generator)),), generator=generator)
        labels = ids.clone()
        labels[: number % 4] = -100
        rows.append({"input_ids": ids, "labels": labels, "number": torch.tensor(number)})
    return rows


def collate(rows: list[Batch]) -> Batch:
    def pad(key: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[key] for row in rows], True, padding_value=value)

    ids, numbers = pad("input_ids", 0), torch.stack([row["number"] for row in rows])
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": (ids != 0).long(), "number": numbers}


def texts_in_batches(num: int = NUM, **settings: Any) -> DataLoader[Batch]:
    return DataLoader(texts(num), batch_size=BATCH, collate_fn=collate, **settings)


def by_number() -> fs.FunctionScorer:
    return fs.FunctionScorer(lambda batch: 0.1 + (batch["number"] % 7).float(), name="by number")


class Bigram(nn.Module):
    """What ranks train: they need not wait for transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(97, 16), nn.Linear(16, 97))
        nn.init.normal_(self.body[1].weight)  # losses that differ, so that weights do

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.body(input_ids))


def model_of(kind: str) -> Any:
    if kind == "bigram":
        return Bigram()
    model = build("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight *= 4  # losses that differ, so that weights do
    if kind == "full":
        return model
    import peft  # which ranks need not wait for

    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Whose steps have the gradient's scale, which AdamW's would not show."""
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.02, momentum=0.9)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): one.detach().clone()
        for name, one in model.named_parameters()
        if one.requires_grad
    }


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B, T-1] nats, 0 where nothing is labelled."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def num_labelled(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum(dim=1)


def means(reference: nn.Module, batch: Batch) -> Tensor:
    """[B] nats a label: f(θ*)."""
    with torch.no_grad():
        return losses(reference, batch).sum(dim=1) / num_labelled(batch)


def by_hand(model: nn.Module, epoch: list[Batch], accumulate: int, num_steps: int) -> None:
    """Plain PyTorch on one process: Σ w·nll over a step's batches by all of its labels, w = exp(-f/τ)."""
    reference, optimizer = copy.deepcopy(model), optimizer_of(model)
    steps = [epoch[at : at + accumulate] for at in range(0, len(epoch), accumulate)]
    for step in itertools.islice(itertools.cycle(steps), num_steps):
        num = sum(num_labelled(batch).sum() for batch in step)
        for batch in step:
            weight = torch.exp(-means(reference, batch) / TAU)
            ((losses(model, batch) * weight[:, None]).sum() / num).backward()
        optimizer.step()
        optimizer.zero_grad()


def under_accelerate(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    loader: Any,
    num_steps: int,
    save: Callable[[list[bool]], object] = bool,
) -> list[bool]:
    """As users write it, with the denominator where there is one; and whether each batch ended a step.

    `save` is called after each batch, with what is returned so far.
    """
    synced: list[bool] = []
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            labels, weight = batch.pop("labels"), batch.pop("flow_weight", None)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            weight = torch.ones(len(labels)) if weight is None else weight
            if "flow_denominator" in batch:
                loss = fs.weighted_lm_loss(logits, labels, weight, denominator=batch["flow_denominator"])
                loss = loss * accelerator.gradient_accumulation_steps
            else:
                loss = fs.weighted_lm_loss(logits, labels, weight)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        synced.append(accelerator.sync_gradients)
        save(synced)
        if sum(synced) == num_steps:
            break
    return synced


def prepared(accelerator: Accelerator, kind: str, loader: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(model, optimizer, loader)"""
    model = model_of(kind)
    scorer = fs.CausalLMScorer(model)
    optimizer = optimizer_of(model)
    options = {"temperature": fs.FixedTemperature(TAU), "window": 8} | options
    return *accelerator.prepare(model, optimizer), prepare(accelerator, loader, scorer, **options)


# -- what it trains to -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_train_to_what_a_plain_loop_trains_to(kind, accumulate):
    expected = model_of(kind)
    start = trained(expected)
    by_hand(expected, list(texts_in_batches()), accumulate, 20)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = prepared(accelerator, kind, texts_in_batches(), include=("denominator",))
    under_accelerate(accelerator, model, optimizer, loader, 20)
    assert furthest(trained(model), trained(expected)) < 1e-5 < furthest(start, trained(expected)) / 100


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_resampled_batches_train_to_what_a_plain_loop_trains_to(kind, accumulate):
    expected = model_of(kind)
    start = trained(expected)
    options: dict[str, Any] = {"temperature": fs.FixedTemperature(TAU), "mode": "resample", "window": 8}
    plain = fs.FlowStream(texts_in_batches(), fs.CausalLMScorer(copy.deepcopy(expected)), **options)
    optimizer, num_steps = optimizer_of(expected), 0
    while num_steps < 20:
        epoch = list(plain)
        for number, batch in enumerate(epoch, start=1):
            (losses(expected, batch).sum() / num_labelled(batch).sum() / accumulate).backward()
            if number % accumulate == 0 or number == len(epoch):
                optimizer.step()
                optimizer.zero_grad()
                num_steps += 1
            if num_steps == 20:
                break

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = prepared(accelerator, kind, texts_in_batches(), **options)
    synced = under_accelerate(accelerator, model, optimizer, loader, 20)
    assert len(synced) <= 20 * accumulate
    assert furthest(trained(model), trained(expected)) < 1e-5 < furthest(start, trained(expected)) / 100


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_of_one_train_to_what_accelerate_alone_trains_to(accumulate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = model_of("full")
    plain = accelerator.prepare(model, optimizer_of(model), texts_in_batches())
    expected_steps = under_accelerate(accelerator, *plain, 20)
    model, optimizer, loader = prepared(accelerator, "full", texts_in_batches(), policy=fs.Uniform())
    assert under_accelerate(accelerator, model, optimizer, loader, 20) == expected_steps
    assert furthest(trained(model), trained(plain[0])) == 0


# -- where it steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_steps_end_where_they_should_though_the_stream_reads_ahead_and_an_evaluation_comes_between(mode):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    held_out = accelerator.prepare(texts_in_batches(10))
    loader = prepare(accelerator, texts_in_batches(), by_number(), mode=mode, window=8)
    for _ in range(2):
        synced, length = [], 0
        for number, batch in enumerate(loader):
            length += 1
            with accelerator.accumulate():
                synced.append(accelerator.sync_gradients)
                assert accelerator.gather_for_metrics(batch["number"]).tolist() == batch["number"].tolist()
            if number % 5 == 1:
                seen = [accelerator.gather_for_metrics(one["number"]) for one in held_out]
                assert torch.cat(seen).tolist() == list(range(10))
        assert synced == [at % 4 == 0 or at == length for at in range(1, length + 1)]
        assert length == 23 or mode == "resample"
    assert not accelerator.gradient_state.in_dataloader


def test_a_prepared_loader_is_taken_as_it_is_and_any_iterable_as_each_ranks_own():
    accelerator = Accelerator(cpu=True)
    before = [batch["number"].tolist() for batch in texts_in_batches()]
    for loader in (accelerator.prepare(texts_in_batches()), list(texts_in_batches()), iter(texts_in_batches())):
        stream = prepare(accelerator, loader, by_number(), window=8)
        assert [batch["number"].tolist() for batch in stream] == before
    assert len(prepare(accelerator, list(texts_in_batches()), by_number())) == 23


def test_a_loop_that_leaves_an_epoch_leaves_nothing_behind():
    accelerator = Accelerator(cpu=True)
    loader = prepare(accelerator, texts_in_batches(), by_number(), window=8)
    for _ in loader:
        break
    assert not accelerator.gradient_state.in_dataloader
    loader.set_epoch(3)
    next(iter(loader))
    assert loader.stream.epoch == 3


# -- what it saves -----------------------------------------------------------------------------------


SAVED = {
    "after 9 steps": (1, {}, False, 9),
    "on the last batch of an epoch": (1, {}, False, 23),
    "in the second epoch": (4, {"include": ("denominator",)}, False, 8),
    "with a loader that has a state": (4, {"include": ("denominator",)}, True, 3),
    "while resampling": (4, {"mode": "resample"}, False, 4),
}


@pytest.mark.parametrize(("accumulate", "options", "is_stateful", "at"), SAVED.values(), ids=SAVED)
def test_a_resumed_run_trains_to_what_the_uninterrupted_one_trains_to(tmp_path, accumulate, options, is_stateful, at):
    def begin() -> tuple[Any, ...]:
        forget()
        torch.seed()  # another process draws other numbers
        sampling = DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=0, use_stateful_dataloader=is_stateful, even_batches=False
        )
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=sampling)
        median = fs.RunningMedian(warmup_samples=16)
        loader = texts_in_batches(shuffle=True)
        return accelerator, *prepared(accelerator, "full", loader, temperature=median, **options)

    def save(synced: list[bool]) -> None:
        if synced[-1] and sum(synced) == at:
            first[0].save_state(tmp_path)
            rest.append(len(synced))

    rest: list[int] = []
    first, num_steps = begin(), at + 5
    synced = under_accelerate(*first, num_steps, save)
    second = begin()
    second[0].load_state(tmp_path)
    assert under_accelerate(*second, 5) == synced[rest[0] :]
    assert furthest(trained(second[1]), trained(first[1])) == 0
    assert second[3].stream.metrics()["flow/tau"] == first[3].stream.metrics()["flow/tau"]


def test_within_a_step_the_stream_resumes_exactly_and_what_is_lost_is_told(tmp_path, caplog):
    """The gradients of its first batches: put back by hand, nothing is missing."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    first = prepared(accelerator, "full", texts_in_batches(), include=("denominator",))
    gradients: list[Tensor] = []

    def save(synced: list[bool]) -> None:
        if len(synced) == 10:
            accelerator.save_state(tmp_path)
            gradients.extend(one.grad.clone() for one in first[0].parameters())

    synced = under_accelerate(accelerator, *first, 5, save)
    assert "saved within an optimizer step" in caplog.text
    forget()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    second = prepared(accelerator, "full", texts_in_batches(), include=("denominator",))
    accelerator.load_state(tmp_path)
    for one, gradient in zip(second[0].parameters(), gradients, strict=True):
        one.grad = gradient
    assert under_accelerate(accelerator, *second, 3) == synced[10:]
    assert furthest(trained(second[0]), trained(first[0])) == 0


def ids_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def test_streams_have_folders_of_their_own_and_free_memory_lets_go_of_them(tmp_path):
    def two_streams() -> tuple[Accelerator, Any, Any]:
        forget()
        accelerator = Accelerator(cpu=True)
        loaders = texts_in_batches(60), list(texts_in_batches(30))
        return accelerator, *(prepare(accelerator, one, by_number(), window=2) for one in loaders)

    accelerator, long, short = two_streams()
    rest = {}
    for name, loader, num in (("long", long, 3), ("short", short, 5)):
        batches = iter(loader)
        ids_of(itertools.islice(batches, num))
        rest[name] = batches
    accelerator.save_state(tmp_path / "both")
    assert {one.name for one in (tmp_path / "both").glob("flowstream_*")} == {"flowstream_0", "flowstream_1"}
    accelerator.save_state(tmp_path / "both")
    assert len(list((tmp_path / "both").glob("flowstream_*/*"))) == 2

    accelerator, other_long, other_short = two_streams()
    accelerator.load_state(tmp_path / "both")
    assert ids_of(other_long) == ids_of(rest["long"]) != []
    assert ids_of(other_short) == ids_of(rest["short"]) != []

    accelerator.free_memory()
    accelerator.save_state(tmp_path / "neither")
    assert list((tmp_path / "neither").glob("flowstream_*")) == []
    prepare(accelerator, texts_in_batches(), by_number())
    accelerator.save_state(tmp_path / "one")
    assert [one.name for one in (tmp_path / "one").glob("flowstream_*")] == ["flowstream_0"]


def test_a_checkpoint_without_a_state_of_the_stream_is_an_error_that_says_how_to_begin_anew(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)
    prepare(accelerator, texts_in_batches(), by_number())
    with pytest.raises(ValueError, match=r"has no state of this stream \(flowstream_0\).*before flowstream's prepare"):
        accelerator.load_state(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------


class Streamed(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        return iter(texts())


def streamed() -> DataLoader[Batch]:
    return DataLoader(Streamed(), batch_size=BATCH, collate_fn=collate)


def test_what_only_one_rank_pulls_from_is_refused():
    accelerator = Accelerator(cpu=True)
    assert type(accelerator.prepare(streamed())).__name__ == "DataLoaderDispatcher"
    with pytest.raises(ValueError, match="wrap the loader unprepared"):
        prepare(accelerator, accelerator.prepare(streamed()), by_number())
    assert len(ids_of(prepare(accelerator, streamed(), by_number()))) == 23
    forget()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    with pytest.raises(ValueError, match="dispatch_batches=True makes rank 0 pull for all"):
        prepare(accelerator, texts_in_batches(), by_number())


def test_a_stream_as_the_loader_is_refused():
    accelerator = Accelerator(cpu=True)
    stream = fs.FlowStream(texts_in_batches(), by_number())
    for loader in (stream, DataLoader(stream, batch_size=None), prepare(accelerator, texts_in_batches(), by_number())):
        with pytest.raises(ValueError, match="is a stream already: give prepare the loader inside it"):
            prepare(accelerator, loader, by_number())


def test_steps_that_go_on_into_the_next_epoch_have_no_denominator():
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with pytest.raises(ValueError, match="leave sync_with_dataloader=True"):
        prepare(accelerator, texts_in_batches(), by_number(), include=("denominator",))
    loader = prepare(accelerator, texts_in_batches(), by_number())
    synced = []
    for _ in itertools.chain(loader, loader):
        with accelerator.accumulate():
            synced.append(accelerator.sync_gradients)
    assert synced == [at % 4 == 0 for at in range(1, 2 * 23 + 1)]


# -- two ranks ---------------------------------------------------------------------------------------


def accelerator_of_ranks(accumulate: int = 1, **sampling: Any) -> Accelerator:
    """As under `torchrun`, in the group that there is."""
    forget()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=DataLoaderConfiguration(**sampling)
    )
    assert accelerator.num_processes == 2
    return accelerator


def train_on_two(folder: str) -> dict[str, Any]:
    """7 steps of which the third and the sixth end an epoch; and the last three again, from a checkpoint."""

    def begin() -> tuple[Any, ...]:
        accelerator = accelerator_of_ranks(4, even_batches=False)
        return accelerator, *prepared(accelerator, "bigram", texts_in_batches(83), include=("denominator",))

    first = begin()
    num = 11 + 4
    synced = under_accelerate(*first, 7, lambda synced: len(synced) == num and first[0].save_state(folder))
    second = begin()
    second[0].load_state(folder)
    resumed = under_accelerate(*second, 7 - sum(synced[:num])) == synced[num:]
    return {
        "synced": synced,
        "trained": {name: one.numpy() for name, one in trained(first[1]).items()},
        "resumed": resumed and furthest(trained(second[1]), trained(first[1])) == 0,
    }


def test_two_ranks_train_to_what_one_process_trains_to_and_resume(tmp_path):
    """Of 21 batches the ranks get 11 and 10, every other one: a step is 8 in a row, the last of an epoch 5."""
    outcomes = run_ranks(train_on_two, 2, str(tmp_path), timeout=100)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == [], outcomes[0].output
    expected = model_of("bigram")
    by_hand(expected, list(texts_in_batches(83)), 8, 7)
    for outcome in outcomes:
        found = outcome.result
        epoch = [False, False, False, True, False, False, False, True, False, False, True]
        assert found["synced"] == (3 * epoch)[: 2 * 11 + 4]
        assert furthest({name: torch.tensor(one) for name, one in found["trained"].items()}, trained(expected)) < 1e-5
        assert found["resumed"]
    assert len(list((tmp_path / "flowstream_0").iterdir())) == 2


def walk_on_two() -> dict[str, list[list[int]]]:
    """What this rank is delivered of loaders of five kinds; and what all have seen of the first."""
    accelerator = accelerator_of_ranks()
    sampler = fs.ElasticDistributedSampler(NUM, shuffle=False)
    own = list(texts_in_batches())[dist.get_rank() :: 2]
    halves = DataLoader(texts()[dist.get_rank() :: 2], batch_size=BATCH, collate_fn=collate)
    loaders: dict[str, tuple[Any, dict[str, Any]]] = {
        "prepared here": (texts_in_batches(), {"mode": "resample"}),
        "over an iterable": (streamed(), {}),
        "with a sampler that splits": (texts_in_batches(sampler=sampler), {}),
        "split by its user": (halves, {"is_split": True}),
        "of batches": (own, {}),
    }
    found, gathered = {}, []
    with pytest.raises(ValueError, match=r"gives whole batches \(batch_size=None\), .* say so with is_split=True"):
        prepare(accelerator, DataLoader(Streamed(), batch_size=None), by_number())
    for name, (loader, options) in loaders.items():
        stream = prepare(accelerator, loader, by_number(), window=4, **options)
        found[name] = []
        for batch in stream:
            if name == "prepared here":
                gathered.append(accelerator.gather_for_metrics(batch["number"]).tolist())
            found[name].append(batch["number"].tolist() if batch.get("flow_weight", torch.ones(1)).any() else [])
    return {**found, "gathered": gathered}


def test_each_rank_gets_its_part_once_however_the_loader_was_split():
    first, second = run_ranks(walk_on_two, 2, timeout=60)
    assert [first.error, second.error] == [None, None], first.output
    ours, theirs = first.result, second.result
    assert ours["gathered"] == theirs["gathered"]
    assert ours["gathered"] == [a + b for a, b in zip(ours["prepared here"], theirs["prepared here"], strict=True)]
    for name in ours.keys() - {"gathered", "prepared here"}:
        assert len(ours[name]) == len(theirs[name])
        delivered = Counter(number for ids in ours[name] + theirs[name] for number in ids)
        assert set(delivered) == set(range(NUM))
        # accelerate fills an iterable's last batches up with its first samples.
        assert max(delivered.values()) == 1 or name == "over an iterable"


# -- the example -------------------------------------------------------------------------------------


def test_example_learns_on_two_ranks_and_goes_on_from_its_checkpoint(tmp_path):
    script = tmp_path / "on_cpus.py"
    script.write_text(
        "import os, runpy, sys\n"
        "os.environ['ACCELERATE_USE_CPU'] = 'true'\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    found = []
    for name, num_steps in (("whole", 10), ("parts", 6), ("parts", 4)):
        arguments = (EXAMPLE, "--checkpoint", name, "--steps", num_steps)
        printed, _ = torchrun(script, *arguments, num_processes=2, folder=tmp_path)
        found += re.findall(r"(\d+) steps, loss ([\d.]+) → ([\d.]+)", printed)
    whole, begun, ended = (tuple(map(float, numbers)) for numbers in found)
    assert (whole[0], begun[0], ended[0]) == (10, 6, 4)
    assert whole[1] == begun[1] > begun[2] > ended[2] == whole[2]
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
