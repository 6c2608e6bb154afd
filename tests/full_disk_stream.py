"""A stream whose loss cache, and then whose checkpoint, may write only so much. Prints JSON."""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any

import torch
from faulty import Bounded

import flowstream as fs


def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 97, (400, 16, 8), generator=generator)
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def weights(cache: str | None) -> tuple[list[torch.Tensor], fs.FlowStream]:
    stream = fs.FlowStream(batches(), fs.CausalLMScorer(Bounded(10**6)), cache=cache)
    found = [batch["flow_weight"] for _ in range(2) for batch in stream]
    return found, stream


def main() -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flowstream").addHandler(handler)
    expected, _ = weights(None)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    found, stream = weights(sys.argv[1] + "/losses")
    fs.save_state(stream, sys.argv[1], step=1)
    hit_rate = stream.metrics()["flow/cache_hit_rate"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        fs.save_state(stream, sys.argv[1], step=2)
        refused = ""
    except OSError as error:
        refused = str(error)
    result = {
        "equal": all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True)),
        "told": sum("no more losses are written" in message for message in told),
        "hit_rate": hit_rate,
        "refused": refused,
        "step": fs.load_state(stream, sys.argv[1]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
