"""Write configs/reference.yaml: every key with its default and a comment, as the parser knows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "configs/reference.yaml"
COMMAND = ["train", "-c", "configs/smollm2-135m.yaml", "--data.system=null", "--print_config=comments"]
TITLES = {"model": "Base, adapters, optimizer and decoding", "data": "Rows, format and splits"}
HEAD = """\
# Every key of `formtune train`, with its default and what it does. Written by `make reference`.
# A task's YAML names only what differs (see the other files in this folder).
"""


def reference() -> str:
    """The text of the file."""
    program = [sys.executable, "-m", "formtune", *COMMAND]
    done = subprocess.run(program, cwd=REFERENCE.parents[1], capture_output=True, text=True, check=True)
    text = re.sub(r"^# (lightning\.pytorch==|The whole job).*\n", "", done.stdout, flags=re.M)
    for group, title in TITLES.items():  # jsonargparse calls both by what links them
        text = text.replace(f"# Linked arguments\n{group}:", f"# {title}\n{group}:")
    # Lists of every class that could be named are longer than the rest of the file.
    return HEAD + re.sub(r", known subclasses: [^\n]*(?=\)$)", "", text, flags=re.M)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
