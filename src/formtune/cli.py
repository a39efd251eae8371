"""The entry point: command table, help, exit codes. Nothing imports it."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

# No telemetry and few messages, unless the user's environment asks for them.
os.environ.update({
    "DO_NOT_TRACK": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
} | os.environ)  # fmt: skip
# formtune reports problems of a model's files in one line; users may still ask for transformers' reports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
# OpenMP's threads spin while they wait. Beside another busy process this made a step three to five times slower; fewer
# spins cost nothing on an idle machine (benchmarks/threads.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Rows are tokenized before training; without this, every worker forked after that would print a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from formtune import __version__
from formtune.commands import COMMANDS
from formtune.configuration.parsing import did_you_mean
from formtune.configuration.yaml_file import check_configs
from formtune.errors import Fault, Stopped, UserError

HELP = """\
usage: formtune COMMAND [-c TASK.yaml | RUN] [--key value ...]

Fine-tune a small language model so that its answers have exactly the declared format.

commands:
{commands}

options:
  -h, --help  Show this; after a command, its keys
  --version   Show the version
  --quiet     With any command: print errors only

examples:
  formtune audit -c configs/demo.yaml
  formtune train -c configs/demo.yaml --model.lora.r 32
  formtune fit -c configs/demo.yaml --print_config=skip_default
  formtune test logs/demo/RUN
  formtune predict logs/demo/RUN prompts.jsonl

One YAML describes a task; every key can also be set on the command line. README.md shows a full run and how to start
with your own rows; configs/ has example YAMLs."""


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.description}" for name, command in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def main(args: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0, 2 for a user's mistake, 1 for a fault or a failed check, 128 plus its number for a signal.
    """
    args = sys.argv[1:] if args is None else args
    try:
        with Path(os.devnull).open("w") as nothing, contextlib.ExitStack() as stack:
            if "--quiet" in args or sys.stdout is None:  # closed by the shell: `>&-`
                stack.enter_context(contextlib.redirect_stdout(nothing))
            code = _run([word for word in args if word != "--quiet"])
            print(end="", flush=True)
        return code
    except (UserError, Fault) as error:
        print(f"formtune: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a run stop together
            print(f"formtune: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("formtune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has left, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
        return 0
    except OSError as error:  # a full disk, a folder that is not writable
        if error.errno is None:
            raise
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        print(f"formtune: error: {place}{error.strerror}", file=sys.stderr)
        return 1


def _run(args: list[str]) -> int:
    if not args:
        print(help_text(), file=sys.stderr)
        return 2
    name, rest = args[0], args[1:]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"formtune {__version__}")
    elif name in COMMANDS:
        check_configs(args)
        return importlib.import_module(COMMANDS[name].module).run(name, rest) or 0
    else:
        near = did_you_mean(name, COMMANDS) or f"; the first word must be a command: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}{near}")
    return 0
