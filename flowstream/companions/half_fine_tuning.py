"""Half fine-tuning: half of a model's matrices are frozen for a round of training, another half in the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from flowstream.companions.wrapped import unwrapped
from flowstream.randomness import permutation

__all__ = ["HalfMask", "half_fine_tuning"]

_Pool = tuple[str, str]
"""Which matrices are halved together: (stack of blocks or "", category)."""


def half_fine_tuning(model: nn.Module, *, seed: int = 0, round: int = 0) -> HalfMask:
    """Freeze half of the model's matrices (`requires_grad=False`, no gradient) and return the mask.

        mask = fs.half_fine_tuning(model)

    As in HFT (Hui et al., ACL 2025, arXiv 2404.18466), "category level": in every block of a transformer half of the
    attention's matrices, half of the feed-forward's and half of the norms are frozen. Where their number is odd, a
    random half of the blocks freezes one more than the others (of up, gate and down: two in half of the blocks, one in
    the rest). Embeddings, head and what else is outside of the blocks train. A bias goes with its weight, and LoRA's
    two matrices with each other.

    A model without attention in its blocks (a ResNet) is halved by module type, over the whole model: half of its
    convolutions, of its norms, of its linear layers, rounded down.

    The choice is a pure function of (seed, round) and the names: the same on all ranks and machines. Only parameters
    that train now are frozen: called twice it freezes half of what is left. Call it before DistributedDataParallel is
    put around the model. An optimizer made before or after works: AdamW neither moves nor decays what has no gradient.
    For `reselect` it must have been given all parameters, which `Trainer` does not do for those that are frozen when
    it makes its own.

    Raises ValueError if fewer than two matrices train, or none could be frozen.
    """
    return HalfMask(model, seed=seed, round=round)


class HalfMask:
    """Owns which parameters of a model are frozen, and knows how it found them."""

    def __init__(self, model: nn.Module, *, seed: int = 0, round: int = 0) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "half_fine_tuning is given a DistributedDataParallel, which waits for the gradient of every parameter "
                "that trained when it was made: freeze first, then wrap, and wrap anew after reselect()"
            )
        self._model, self._seed = unwrapped(model), seed
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._units = _units(self._trained)
        if len(self._units) < 2:
            raise ValueError(
                f"{len(self._units)} matrices of the {type(self._model).__name__} train, and half of them cannot be "
                "frozen: unfreeze the model first (requires_grad_(True))"
            )
        self._pools = _pools(self._model, self._units)
        self.frozen: tuple[str, ...] = ()
        """Names of the parameters that are frozen now."""
        self.reselect(round)

    def __repr__(self) -> str:
        return f"HalfMask({len(self.frozen)} parameters frozen, {self.fraction:.0%} of the entries train)"

    @property
    def fraction(self) -> float:
        """Of the entries that trained before, the share that trains now."""
        held = sum(self._trained[name].numel() for name in self.frozen)
        return 1.0 - held / sum(p.numel() for p in self._trained.values())

    def reselect(self, round: int) -> None:
        """Freeze the half of this round, 0 or more, and unfreeze what was: the paper draws anew each round."""
        if isinstance(round, bool) or not isinstance(round, int) or round < 0:
            raise ValueError(f"round is {round!r}: give a whole number of at least 0")
        chosen = _halved(self._pools, (self._seed, round))
        if not chosen:
            raise ValueError(
                f"no two matrices of one kind train in a block of the {type(self._model).__name__}, so that half of "
                "them could be frozen: unfreeze more of it"
            )
        self.restore()
        self.frozen = tuple(name for unit in sorted(chosen) for name in self._units[unit])
        for name in self.frozen:
            self._trained[name].requires_grad_(False).grad = None

    def restore(self) -> None:
        """Let everything train that trained before."""
        for name in self.frozen:
            self._trained[name].requires_grad_(True)
        self.frozen = ()


def _units(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters that are frozen together, by what they share of their names."""
    units: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layer, adapted, _ = name.partition(".lora_")
        owner, _, last = name.rpartition(".")
        units[layer if adapted else owner if last in ("weight", "bias") else name].append(name)
    return dict(units)


def _pools(model: nn.Module, units: Iterable[str]) -> dict[_Pool, list[list[str]]]:
    """Of each pool, the units of its blocks in order; a model without attention has one block."""
    modules = dict(model.named_modules())
    found: dict[_Pool, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        stack, number, inside = _place(unit, modules)
        if number:
            found[stack, _category(modules.get(unit), inside)][number].append(unit)
    if any(category == "attention" for _, category in found):
        return {pool: list(blocks.values()) for pool, blocks in found.items()}
    kinds: dict[_Pool, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        kinds["", type(modules[unit]).__name__ if unit in modules else "parameter"][""].append(unit)
    return {pool: list(blocks.values()) for pool, blocks in kinds.items()}


def _place(unit: str, modules: dict[str, nn.Module]) -> tuple[str, str, str]:
    """(the outermost list of blocks, the number of the block, the name within); empty outside of blocks."""
    parts = unit.split(".")
    for position in range(1, len(parts)):
        stack = ".".join(parts[:position])
        if isinstance(modules.get(stack), nn.ModuleList):
            return stack, parts[position], ".".join(parts[position + 1 :])
    return "", "", unit


def _category(module: nn.Module | None, inside: str) -> str:
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "attention" if "attn" in inside.lower() or "attention" in inside.lower() else "feed-forward"


def _halved(pools: dict[_Pool, list[list[str]]], seed: tuple[int, int]) -> set[str]:
    """Units to freeze: half of each block's, or, of an odd number, one more in half of the blocks."""
    chosen: set[str] = set()
    for (stack, category), blocks in pools.items():
        use = f"half fine-tuning {stack} {category}"
        odd = [number for number, units in enumerate(blocks) if len(units) % 2]
        # Of a lone block the smaller half is frozen: the head of a ResNet trains.
        more = {odd[place] for place in permutation(len(odd), seed, use=use)[: len(odd) // 2]}
        for number, units in enumerate(blocks):
            order = permutation(len(units), seed, use=f"{use} {number}")
            chosen.update(units[place] for place in order[: len(units) // 2 + (number in more)])
    return chosen
