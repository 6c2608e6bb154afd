"""`flowstream <command>`: the commands by name, and the way in."""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import tyro

from flowstream.cli.cache import Cache
from flowstream.cli.compare import Compare
from flowstream.cli.demo import Demo
from flowstream.cli.inspect import Inspect
from flowstream.cli.score import Score
from flowstream.cli.train import Train
from flowstream.cli.vision import Vision


class Command(Protocol):
    """A frozen dataclass: its fields are the command's options, its docstring is the help."""

    def run(self) -> None:
        """Do it. What the user did wrong is a ValueError or OSError, whose message says what to do."""


COMMANDS: dict[str, Callable[..., Command]] = {
    "cache": Cache,
    "compare": Compare,
    "demo": Demo,
    "inspect": Inspect,
    "score": Score,
    "train": Train,
    "vision": Vision,
}
"""Name on the command line → options. A module of a command imports torch in `run`, not before."""


def main(args: Sequence[str] | None = None) -> int:
    """Parse and run a command; the exit status."""
    command: Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="flowstream", description="Online FLOW for any data loader.", args=args
    )
    try:
        command.run()
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print("flowstream:", " ".join(str(error).split()), file=sys.stderr)  # libraries' errors may have many lines
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
