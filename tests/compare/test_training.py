"""Each method's run through the one loop, against a loop of its own written out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from torch import Tensor

import flowstream as fs
from flowstream.compare.evaluation import Measures
from flowstream.compare.feeds import Feeds
from flowstream.compare.learner import Learner
from flowstream.compare.material import Material
from flowstream.compare.methods import Method
from flowstream.compare.settings import Settings
from flowstream.compare.training import Rates, Run, Spent, afforded_steps, finetune, spending
from flowstream.finetune.encoding import Encoded
from flowstream.finetune.tokens import TokenDataset

STEPS, LR, BATCH, CLIP = 6, 5e-3, 4, 0.5
SETTINGS = Settings(strengths="100", fraction=0.2, dro_temperature=0.3, rank=2, max_grad_norm=CLIP)


def samples(num: int, seed: int) -> TokenDataset:
    draws = torch.Generator().manual_seed(seed)

    def one() -> Encoded:
        ids = torch.randint(3, 97, (int(torch.randint(4, 12, (), generator=draws)),), generator=draws).tolist()
        return Encoded(ids=ids, labels=[-100, -100, *ids[2:]])

    return TokenDataset.of(one() for _ in range(num))


@dataclass(frozen=True, kw_only=True)
class Place:
    material: Material
    model: Any

    @property
    def feeds(self) -> Feeds:
        return Feeds(
            open_loader=lambda only: self.material.loader(batch_size=BATCH, seed=0, only=only),
            lengths=self.material.train.lengths.tolist(),
            seed=0,
            scorer=fs.CausalLMScorer(self.model),
            window=2,
            warmup_samples=8,
        )

    def run(self, name: str, *, subset: frozenset[int] | None = None) -> tuple[Run, dict[str, Tensor]]:
        """By the method's name; and the parameters that it ends with."""
        method = Method.parse(name)
        torch.manual_seed(0)
        learner = Learner(self.model, seed=0)
        method.equip(learner, SETTINGS, method.strengths(SETTINGS)[0])
        states: dict[int, dict[str, Tensor]] = {}
        with self.feeds.open(method.feed, subset) as feed:
            run = finetune(
                learner,
                feed,
                learning_rate=LR,
                steps=STEPS,
                measured_at=frozenset({2, STEPS}),
                measure=self.material.split("validation").measure,
                keep=lambda step, state: states.update({step: state}),
                trace_every=2,
                max_grad_norm=CLIP,
            )
        assert set(states) == {2, STEPS}
        return run, states[STEPS]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        loader = self.material.loader(batch_size=BATCH, seed=0)
        num = 0
        while True:
            for batch in loader:
                if num == STEPS:
                    return
                num += 1
                yield batch


@pytest.fixture(scope="module")
def place() -> Place:
    parts = {part: samples(num, seed) for seed, (part, num) in enumerate({"train": 20, "validation": 5}.items())}
    material = Material(
        model="",
        pad_id=0,
        test=parts["validation"],
        general_validation=samples(3, 7),
        general_test=samples(3, 8),
        **parts,
    )
    return Place(material=material, model=build("llama").requires_grad_(False))


def rate(step: int) -> float:
    """One step of warm-up, then half a cosine."""
    return LR if step == 0 else LR * 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))


def nll(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of every label [B, T - 1], 0 where there is none; and where there is one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses, (labels >= 0).float()


def mean(model: Any, batch: dict[str, Tensor]) -> Tensor:
    losses, labelled = nll(model, batch)
    return losses.sum() / labelled.sum()


def train(
    place: Place,
    loss_of: Callable[[Any, dict[str, Tensor]], Tensor],
    batches: Any = None,
    step_of: Callable[[Any], Callable[[], None]] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Parameters and clip rate after AdamW, written out."""
    model = copy.deepcopy(place.model).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    num_cut = 0
    for step, batch in enumerate(batches if batches is not None else place.batches()):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss_of(model, batch).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        num_cut += norm > CLIP
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / (norm + 1e-6))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.step()
        if step_of is not None:
            filtered(model, optimizer, before)
        optimizer.zero_grad()
    return model.state_dict(), num_cut / STEPS


def filtered(model: Any, optimizer: Any, before: dict[str, Tensor]) -> None:
    """Of each tensor, put back all but the fifth with the largest momentum."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            momentum = optimizer.state[parameter]["exp_avg"].abs().flatten()
            keep = torch.zeros(len(momentum), dtype=torch.bool)
            keep[momentum.argsort(descending=True, stable=True)[: max(1, int(0.2 * len(momentum)))]] = True
            parameter.copy_(torch.where(keep.view_as(parameter), parameter, before[name]))


def assert_same(place: Place, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of the way that was gone: Adam makes a step of a gradient that is but rounding."""
    assert state.keys() == expected.keys()
    apart, gone = (
        math.sqrt(sum(float(((one[name] - expected[name]) ** 2).sum()) for name in expected))
        for one in (state, place.model.state_dict())
    )
    assert apart < 1e-4 * gone


def test_standard_is_a_plain_loop_with_its_clip_rate_and_distance(place: Place) -> None:
    run, state = place.run("standard")
    expected, clip_rate = train(place, mean)
    assert_same(place, state, expected)
    assert 0 < clip_rate <= 1
    assert run.points[-1].clip_rate == pytest.approx(clip_rate)
    moved = sum(float(((expected[n] - p) ** 2).sum()) for n, p in place.model.named_parameters())
    assert run.points[-1].distance == pytest.approx(math.sqrt(moved), rel=1e-4)
    assert run.num_trained == run.num_parameters == sum(p.numel() for p in place.model.parameters())


def test_l2_adds_the_mean_square_of_what_has_moved(place: Place) -> None:
    start = dict(place.model.named_parameters())
    num = sum(p.numel() for p in start.values())

    def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return mean(model, batch) + 100 / num * sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters())

    assert_same(place, place.run("l2")[1], train(place, loss_of)[0])


def test_l1_adds_the_mean_size_of_what_has_moved(place: Place) -> None:
    start = dict(place.model.named_parameters())
    num = sum(p.numel() for p in start.values())

    def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return mean(model, batch) + 100 / num * sum((p - start[n]).abs().sum() for n, p in model.named_parameters())

    assert_same(place, place.run("l1")[1], train(place, loss_of)[0])


def test_dro_is_the_log_mean_exp_of_the_samples_current_losses(place: Place) -> None:
    def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        losses, labelled = nll(model, batch)
        of_samples = losses.sum(1) / labelled.sum(1)
        return 0.3 * torch.log(torch.exp(of_samples / 0.3).mean())

    assert_same(place, place.run("dro")[1], train(place, loss_of)[0])


def test_mofo_moves_a_fifth_of_each_tensor(place: Place) -> None:
    assert_same(place, place.run("mofo")[1], train(place, mean, step_of=filtered)[0])


def test_flow_weighs_samples_and_resampling_draws_them(place: Place) -> None:
    def weighted(model: Any, batch: dict[str, Tensor]) -> Tensor:
        losses, labelled = nll(model, batch)
        return (batch["flow_weight"][:, None] * losses).sum() / labelled.sum()

    for name, mode, loss_of in (("flow", "weight", weighted), ("resample", "resample", mean)):
        tau = fs.RunningMedian(warmup_samples=8)
        loader = place.material.loader(batch_size=BATCH, seed=0)
        stream = fs.FlowStream(loader, fs.CausalLMScorer(place.model), mode=mode, temperature=tau, window=2)
        with stream:
            batches = [dict(batch) for _ in range(6) for batch in stream][:STEPS]
        assert_same(place, place.run(name)[1], train(place, loss_of, batches)[0])


def test_flow_token_weighs_every_token_by_its_own_loss_under_the_reference(place: Place) -> None:
    def weighted(model: Any, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            of_reference, _ = nll(place.model, batch)
        losses, labelled = nll(model, batch)
        weight = torch.exp(-of_reference.half().float() / batch["flow_tau"])  # [B, T - 1]; kept in fp16
        return (weight * losses * labelled).sum() / labelled.sum()

    loader = place.material.loader(batch_size=BATCH, seed=0)
    temperature = fs.RunningMedian(warmup_samples=8)
    scorer = fs.CausalLMScorer(place.model)
    with fs.FlowStream(loader, scorer, level="token", temperature=temperature, window=2, include=("tau",)) as stream:
        batches = [dict(batch) for _ in range(6) for batch in stream][:STEPS]
    assert_same(place, place.run("flow-token")[1], train(place, weighted, batches)[0])


def test_a_merged_lora_computes_what_the_adapters_compute_and_little_is_trained(place: Place) -> None:
    run, state = place.run("lora")
    merged = copy.deepcopy(place.model)
    merged.load_state_dict(state)
    assert place.material.split("validation").measure(merged).target_loss == pytest.approx(
        run.points[-1].validation.target_loss, abs=1e-5
    )
    assert run.num_trained < 0.3 * run.num_parameters
    moved = [name for name, p in place.model.named_parameters() if not torch.equal(p, state[name])]
    assert moved
    assert all("proj" in name for name in moved)
    assert run.points[-1].distance > 0


def test_half_of_the_matrices_stay_and_a_subsample_sees_its_samples(place: Place) -> None:
    run, state = place.run("hft")
    moved = [name for name, p in place.model.named_parameters() if not torch.equal(p, state[name])]
    assert 0.3 < len(moved) / len(state) < 0.7
    assert run.num_trained < run.num_parameters
    run, _ = place.run("subsample", subset=frozenset(range(4, 12)))
    assert run.num_samples == 8


def test_permuted_weights_train_too(place: Place) -> None:
    expected = place.run("flow")[1]
    state = place.run("permuted")[1]
    assert not torch.equal(state["model.norm.weight"], expected["model.norm.weight"])


def test_what_is_afforded_is_the_last_step_within_the_allowance(place: Place) -> None:
    run, _ = place.run("standard")
    rates = Rates.of(run.num_parameters, run.num_trained, run.num_parameters)
    assert rates.train == 6 * run.num_parameters
    allowance = rates.flops(run.spent[-1])
    with place.feeds.open("standard") as feed:
        assert afforded_steps(spending(feed), rates, allowance) == STEPS
    with place.feeds.open("flow") as feed:
        afforded = afforded_steps(spending(feed), rates, allowance)
    assert 0 < afforded < STEPS
    flow, _ = place.run("flow")
    costs = [rates.flops(spent) for spent in flow.spent]
    assert costs[afforded - 1] <= allowance < costs[afforded]
    lora, _ = place.run("lora")
    cheap = Rates.of(lora.num_parameters, lora.num_trained, run.num_parameters)
    assert cheap.train == 4 * lora.num_parameters + 2 * lora.num_trained
    assert afforded_steps([Spent(10 * k, 0) for k in range(1, 9)], cheap, 45 * cheap.train) == 4


def test_measures_are_those_of_every_sample_alone(place: Place) -> None:
    split = place.material.split("validation").measure(place.model)
    assert isinstance(split, Measures)
    for dataset, found in ((place.material.validation, split.target_loss), (place.material.general_validation, None)):
        total, num = 0.0, 0
        for index in range(len(dataset)):
            item = {name: value[None] for name, value in dataset[index].items()}
            losses, labelled = nll(place.model, {**item, "attention_mask": torch.ones_like(item["input_ids"])})
            total, num = total + float(losses.sum()), num + int(labelled.sum())
        assert total / num == pytest.approx(found if found is not None else split.retained_loss, rel=1e-5)
