"""Companions on two real ranks, under DDP and FSDP2, against one process that sees it all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowstream.companions.dro import Dro
from flowstream.companions.half_fine_tuning import half_fine_tuning
from flowstream.companions.mofo import MoFO
from flowstream.companions.reference_distance import DistanceToReference

NORMS = ("l2", "l1")
LOSSES = (torch.tensor([0.1, 2.0, 0.7]), torch.tensor([3.0]), torch.zeros(0))
SHARES = ((0, 1), (0, 2), (2, 2))
"""Which of the losses each of the two ranks has."""


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))


def inputs(rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))


def nudged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    return model


def whole(model: nn.Module) -> list[Any]:
    """Values and gradients, of all ranks together."""
    found = []
    for parameter in model.parameters():
        for tensor in (parameter.detach(), parameter.grad):
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found.append(tensor.tolist())
    return found


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "DDP":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, reference: nn.Module, norm: Any, loss: Any) -> tuple[float, float, list[Any]]:
    """Three steps with both pulls; the last penalty and distance, and all parameters and gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    distance = DistanceToReference(model, norm=norm, strength=0.5, per_parameter=False, reference=reference)
    distance.decouple(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        penalty = distance.penalty()
        (loss(model) + penalty).backward()
        optimizer.step()
    return penalty.item(), distance.distance().item(), whole(model)


def sharded_reference(kind: str) -> nn.Module:
    return wrapped(kind, model_of()) if kind == "FSDP2" else model_of()


def pulled_on_a_rank(kind: str) -> dict[str, Any]:
    rank = dist.get_rank()

    def loss(model: nn.Module) -> Tensor:
        return model(inputs(rank)).square().mean()

    return {norm: train(wrapped(kind, nudged(model_of())), sharded_reference(kind), norm, loss) for norm in NORMS}


def losses_on_a_rank() -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = pulled_on_a_rank("DDP")
    found["dro"] = []
    for shares in SHARES:
        losses = LOSSES[shares[rank]].clone().requires_grad_()
        value = Dro(0.5, group=dist.group.WORLD)(losses)
        value.backward()
        assert losses.grad is not None
        found["dro"].append((value.item(), losses.grad.tolist()))
    found["half"] = half_fine_tuning(model_of(), seed=4).frozen
    try:
        half_fine_tuning(wrapped("DDP", model_of()))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def sharded_on_a_rank() -> dict[str, Any]:
    found: dict[str, Any] = pulled_on_a_rank("FSDP2")
    model: Any = wrapped("FSDP2", model_of())
    optimizer = MoFO(torch.optim.AdamW(model.parameters(), lr=0.01), fraction=0.25)
    before = [p.to_local().detach().clone() for p in model.parameters()]
    model(inputs(dist.get_rank())).square().mean().backward()
    optimizer.step()
    shards = [p.to_local() for p in model.parameters()]
    found["moved"] = [(int((p != old).sum()), p.numel()) for p, old in zip(shards, before, strict=True)]
    return found


def check_pulled(found: dict[str, Any]) -> None:
    for norm in NORMS:
        alone = train(
            nudged(model_of()), model_of(), norm, lambda m: (m(inputs(0)).square() + m(inputs(1)).square()).mean() / 2
        )
        torch.testing.assert_close(found[norm][:2], alone[:2])
        for ours, theirs in zip(found[norm][2], alone[2], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-6, rtol=1e-5)


def test_two_ranks_under_ddp_do_what_one_does() -> None:
    outcomes = run_ranks(losses_on_a_rank, 2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    first, second = (outcome.result for outcome in outcomes)
    for found in (first, second):
        check_pulled(found)

    for case, shares in enumerate(SHARES[:2]):
        together = torch.cat([LOSSES[share] for share in shares]).requires_grad_()
        value = Dro(0.5)(together)
        value.backward()
        assert together.grad is not None
        gradients = torch.tensor(first["dro"][case][1] + second["dro"][case][1])
        torch.testing.assert_close(gradients / 2, together.grad)  # the mean over ranks, as DDP forms it
        for found in (first, second):
            torch.testing.assert_close(found["dro"][case][0], value.item())
    assert first["dro"][2] == second["dro"][2] == (0.0, [])

    assert first["half"] == second["half"] == half_fine_tuning(model_of(), seed=4).frozen != ()
    assert "freeze first, then wrap" in first["refused"]


@pytest.mark.soak
def test_two_ranks_under_fsdp_do_what_one_does() -> None:
    outcomes = run_ranks(sharded_on_a_rank, 2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for outcome in outcomes:
        check_pulled(outcome.result)
        # Of each rank's shard a quarter moves.
        assert [moved for moved, _ in outcome.result["moved"]] == [int(n / 4) for _, n in outcome.result["moved"]]
