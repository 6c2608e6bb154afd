"""MoFO: of each block of parameters only those with the largest momentum move in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flowstream.companions.wrapped import check_number, local

__all__ = ["MoFO"]

_MOMENTA = ("exp_avg", "momentum_buffer")
"""Under what names optimizers keep the first moment."""


class MoFO(Optimizer):
    """An optimizer around any other with momentum (Chen et al., TMLR 2025, arXiv 2407.20999, Algorithm 1).

        optimizer = fs.MoFO(torch.optim.AdamW(model.parameters(), lr=1e-5), fraction=0.1)

    Each step is the inner optimizer's, after which all entries but the `fraction` with the largest |momentum| of their
    block are what they were. All moments are updated. Groups, state and `state_dict()` are the inner optimizer's own,
    so that schedulers, GradScaler, accelerate and `Trainer(optimizers=(optimizer, None))` take it as they take that.

    Weight decay, too, acts on the entries that move alone: so that the others stay where they are. (The paper has
    none; the authors' code decays every entry.)

    Memory: one copy of the parameters that have a gradient, from before the inner step until it is filtered, and
    some ten bytes an entry of the largest tensor. No synchronisation.

    Args:
        optimizer: with "exp_avg" (Adam, AdamW, Lion, …) or "momentum_buffer" (SGD with momentum) in its state.
        fraction: α, of each block, in (0, 1]; ⌊α·n⌋ of n entries move, as in the authors' code, and at least one.
            They recommend 0.05 to 0.2. Of equal momenta the one of lower index moves first.
        blocks: (parameter) → into how many equal parts along dimension 0 it is split, such as its attention heads, each
            a block; 0 for one that moves as a whole. By default each tensor is a block. The authors' code leaves
            biases and norms whole: `blocks=lambda p: int(p.ndim > 1)`. Under FSDP2 each rank's shard is split.

    Raises:
        ValueError: a fraction outside (0, 1]; SGD without momentum; blocks that do not divide dimension 0.
        RuntimeError: at the first step, if the state has no momentum; nothing has moved then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        fraction: float = 0.1,
        blocks: Callable[[Tensor], int] | None = None,
    ) -> None:
        check_number("fraction", fraction, least=0.0, most=1.0, above=True)
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer, ready made")
        for group in optimizer.param_groups:
            if group.get("momentum", 1) == 0 and "betas" not in group:
                raise ValueError(
                    f"the {type(optimizer).__name__} has momentum=0, and MoFO picks by momentum: set it, as in "
                    "SGD(…, momentum=0.9)"
                )
        # The base class is to set up its hooks, and nothing of the inner optimizer.
        self.optimizer = Optimizer.__new__(Optimizer)
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.optimizer = optimizer
        self.fraction, self.blocks = float(fraction), blocks

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the inner optimizer does."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: MoFO has no state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a closure is evaluated once, before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        filtered = [
            (parameter, num_blocks)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and (num_blocks := self._num_blocks(parameter))
        ]
        if any(parameter.grad.is_sparse for parameter, _ in filtered):
            raise ValueError(
                "a gradient is sparse (nn.Embedding(sparse=True)): MoFO picks among all entries of a tensor"
            )
        before = [local(parameter).clone() for parameter, _ in filtered]
        self.optimizer.step()
        momenta = [self._momentum(parameter) for parameter, _ in filtered]
        if any(momentum is None for momentum in momenta):
            for (parameter, _), old in zip(filtered, before, strict=True):
                local(parameter).copy_(old)
            raise RuntimeError(
                f"the state of {type(self.optimizer).__name__} has neither of {', '.join(_MOMENTA)}: MoFO picks by "
                "momentum, unquantised and of each entry; take AdamW, Adam, Lion or SGD with momentum"
            )
        before.reverse()
        for (parameter, num_blocks), momentum in zip(filtered, momenta, strict=True):
            now, old = local(parameter), before.pop()  # freed as it is read
            now.copy_(torch.where(largest(local(momentum), self.fraction, num_blocks), now, old))
        return loss

    def _num_blocks(self, parameter: Tensor) -> int:
        if self.fraction == 1.0 or local(parameter).numel() == 0:
            return 0
        if self.blocks is None:
            return 1
        num, shape = int(self.blocks(parameter)), local(parameter).shape
        if num < 0 or (num > 1 and (not shape or shape[0] % num)):
            raise ValueError(
                f"blocks gives {num} for a parameter of shape {list(shape)}: dimension 0 must divide by it"
            )
        return num

    def _momentum(self, parameter: Tensor) -> Any:
        state = self.state.get(parameter, {})
        found = next((state[name] for name in _MOMENTA if state.get(name) is not None), None)
        return found if found is not None and found.shape == parameter.shape else None

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "fraction": self.fraction, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MoFO.__init__(self, state["optimizer"], fraction=state["fraction"], blocks=state["blocks"])

    def __repr__(self) -> str:
        return f"MoFO({self.optimizer!r}, fraction={self.fraction})"


def largest(momentum: Tensor, fraction: float, num_blocks: int) -> Tensor:
    """Where |momentum| is among the largest ⌊fraction·n⌋, at least one, of its block of n entries; ties by index."""
    size = momentum.reshape(num_blocks, -1).abs()
    num = max(1, int(size.shape[1] * fraction + 1e-6))  # so that 0.29 of 100 is 29
    least = size.topk(num, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, ties = size > least, size == least
    room = num - above.sum(1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(1, dtype=torch.int32) <= room))
    return chosen.view(momentum.shape)
