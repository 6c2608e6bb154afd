"""Writes the README's table of what resumes exactly, anew: `python tests/sources/write_table.py`."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import loader_recipes

BEGIN = "<!-- what resumes exactly: written by tests/sources/write_table.py -->\n"
END = "\n<!-- end -->"


def main() -> None:
    logging.getLogger("flowstream").setLevel(logging.ERROR)
    readme = Path(__file__).parents[2] / "README.md"
    with tempfile.TemporaryDirectory() as folder:
        loader_recipes.write_shards(Path(folder))
        table = loader_recipes.table(Path(folder))
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table + END + rest.split(END, 1)[1])
    print(table)


if __name__ == "__main__":
    main()
