"""Runs an example as it is, and writes down what it trains on: `watched_example.py LOG EXAMPLE.py …`.

The loss is asked for once a step: each time, the texts of that batch, whose tokens are bytes, go to LOG as a line.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

import flowstream as fs

_, log, *sys.argv = sys.argv
weighted_lm_loss = fs.weighted_lm_loss


def watched(logits: Tensor, labels: Tensor, weight: Tensor, **settings: Any) -> Tensor:
    texts = [bytes(row[row >= 0].tolist()).hex() for row in labels]
    line = {"texts": [text for text in texts if text], "weights": weight.tolist()}
    with Path(f"{log}-{os.environ['RANK']}").open("a") as file:
        print(json.dumps(line), file=file)
    return weighted_lm_loss(logits, labels, weight, **settings)


fs.weighted_lm_loss = watched
runpy.run_path(sys.argv[0], run_name="__main__")
