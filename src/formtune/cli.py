"""The entry point: command table, help, exit codes. Nothing imports it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# formtune reports what is wrong with a model's files in one line; a user may still ask for transformers' own reports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
# Rows are tokenized once, up front; a fork after that would print a warning at every start of a worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from formtune import __version__
from formtune.commands import COMMANDS
from formtune.configuration.yaml_file import check_configs
from formtune.errors import Fault, Stopped, UserError

HELP = """\
usage: formtune COMMAND [-c TASK.yaml | RUN] [--key value ...]

Fine-tune a small language model so that its answers have exactly the declared format.

commands:
{commands}

options:
  -h, --help  Show this; after a command, the keys it takes
  --version   Show the version

examples:
  formtune audit -c configs/demo.yaml
  formtune train -c configs/demo.yaml --model.lora.r 32
  formtune fit -c configs/demo.yaml --print_config=skip_default
  formtune test logs/demo/RUN
  formtune compare logs/demo/r16 logs/demo/r32

One YAML describes a task, and every key of it can be set on the command line too. README.md shows a whole run and how
to start with your own rows; configs/ holds YAMLs to start from."""


class _Output:
    """Standard output whose reader may leave (`| head`) without ending a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def help_text() -> str:
    """What `formtune --help` prints."""
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:{width}}  {one.description}" for name, one in COMMANDS.items()))


def main(args: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0, 2 for a user's mistake, 1 for a fault, 128 plus its number for a signal.
    """
    args = sys.argv[1:] if args is None else args
    output: Any = _Output(sys.stdout or Path(os.devnull).open("w"))  # noqa: SIM115
    with contextlib.redirect_stdout(output):
        try:
            return _guarded(args)
        finally:
            output.flush()


def _guarded(args: list[str]) -> int:
    try:
        return _run(args)
    except UserError as error:
        print(f"formtune: error: {error}", file=sys.stderr)
        return 2
    except Fault as error:
        print(f"formtune: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a run stop together
            print(f"formtune: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("formtune: interrupted", file=sys.stderr)
        return 130


def _run(args: list[str]) -> int:
    if not args:
        print(help_text(), file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(help_text())
    elif args[0] == "--version":
        print(f"formtune {__version__}")
    elif args[0] in COMMANDS:
        check_configs(args)
        command = importlib.import_module(f"formtune.commands.{COMMANDS[args[0]].module}")
        return command.run(args[0], args[1:]) or 0
    else:
        raise UserError(_unknown(args[0]))
    return 0


def _unknown(name: str) -> str:
    known = f"the commands are {', '.join(COMMANDS)}"
    if name.startswith("-"):
        return f"a command comes first, before {name}; {known}"
    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f"no command {name!r}; " + (f"did you mean {near[0]}?" if near else known)
