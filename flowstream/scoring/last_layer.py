"""What in a model's last layer needs the labelled rows only: all but its keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_OUTPUTS = ("o_proj", "out_proj", "dense")
"""What Llama and most others, OPT, and Phi call the last layer of their attention."""


class LabelledRows:
    """Finds the modules of the last decoder layer that treat each row by itself, and runs them on some rows.

    A prompt's rows are read as keys and values there, and nothing else of them reaches the loss. Rows that are left out
    come out as zeros. Where the layer is built otherwise, nothing is found, and nothing spared.
    """

    def __init__(self, model: nn.Module) -> None:
        layer = _last_layer(model)
        self.attention: nn.Module | None = None
        """The attention whose queries are only wanted where a row is labelled."""
        self._modules: list[nn.Module] = []
        if layer is None:
            return
        for module in layer.children():
            query = getattr(module, "q_proj", None)
            outputs = [output for name in _OUTPUTS if isinstance(output := getattr(module, name, None), nn.Module)]
            if isinstance(query, nn.Module) and len(outputs) == 1:
                self.attention = module
                self._modules += [query, *outputs]
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, nn.Module):
            self._modules.append(mlp)

    @contextmanager
    def only(self, rows: Tensor, length: int) -> Iterator[None]:
        """Within it: of inputs [1, length, D], the modules read `rows` [n]."""
        if len(rows) == length:
            yield
            return

        def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].index_select(1, rows), *args[1:])

        def put_back(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.new_zeros(1, length, output.shape[-1]).index_copy_(1, rows, output)

        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(take).remove)
                stack.callback(module.register_forward_hook(put_back).remove)
            yield


def _last_layer(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    num_layers = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return stacks[0][-1] if len(stacks) == 1 else None
