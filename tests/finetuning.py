"""Everything that `flowstream train` reads, tiny: a Llama of random weights with its tokenizer, texts, shards."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import build
from killed_finetuning import End
from tiny_tokenizers import WORDS, byte_level

from flowstream.cli.__main__ import main

Record = Mapping[str, Any]


def save_model(folder: Path, *, template: str | None = None, seed: int = 0, **settings: Any) -> str:
    """A Llama and its tokenizer, as `save_pretrained` writes them."""
    tokenizer = byte_level(template)
    model = build("llama", vocab_size=len(tokenizer), max_position_embeddings=128, **settings)
    generator = torch.Generator().manual_seed(seed)
    model.lm_head.weight.data *= 8  # or all losses would be alike
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def problems(num: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and responses of a few words, some of them easy: the losses differ."""
    draws = random.Random(seed)
    return [
        {
            "prompt": " ".join(draws.choices(WORDS, k=draws.randint(1, 4))),
            "response": " ".join(draws.choices(WORDS[: draws.choice([2, 12])], k=draws.randint(1, 6))),
        }
        for _ in range(num)
    ]


def write_shards(folder: Path, records: Sequence[Record], *, num_shards: int) -> str:
    """Tar shards of .json samples, and the pattern that names them."""
    folder.mkdir()
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number, record in enumerate(records[shard::num_shards]):
                _add(tar, f"{shard:03d}{number:05d}.json", json.dumps(record).encode())
    return str(folder / f"{{000..{num_shards - 1:03d}}}.tar")


def run(command: str, *arguments: object, **options: object) -> int:
    """The exit status of a command: `max_steps=3` is --max-steps 3, a list repeats its option, False is --no-…."""
    return main([command, *map(str, arguments), *flags(options)])


def flags(options: Mapping[str, object]) -> Iterable[str]:
    for name, value in options.items():
        option = name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool):
                yield f"--{option}" if each else f"--no-{option}"
            else:
                yield from [f"--{option}", str(each)]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class Lives:
    """Runs commands in processes of their own, which may be told to kill themselves: see `killed_finetuning`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killed_finetuning.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # threads cannot be forked
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, str(script)], env=environment, **pipes)

    def live(
        self,
        command: str,
        *,
        until: object = "",
        delay: float = 0.0,
        number: int = signal.SIGKILL,
        num_ranks: int = 1,
        **options: object,
    ) -> End:
        """What came of a command; it, or its last rank, gets a signal `delay` seconds after a path is there."""
        life: dict[str, Any] = {"until": str(until), "delay": delay, "number": number, "num_ranks": num_ranks}
        life["arguments"] = [command, *flags(options)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._is_ready:
            self._is_ready = self._process.stdout.readline() == "ready\n"
        print(json.dumps(life), file=self._process.stdin, flush=True)
        return End(**json.loads(self._process.stdout.readline()))

    _is_ready = False

    def close(self) -> None:
        self._process.communicate()
