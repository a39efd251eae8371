"""The entry: verbs, help, exit codes. Knows the verbs but imports none, so that help and mistakes answer at once."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# What is wrong with a model's files is said here, in one line; a user may ask for the reports of transformers too.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
# Rows are tokenised once and up front; a fork after that would print a warning at every start of a worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from formtune import __version__
from formtune.configuration.yaml_file import PLACES, check_yaml
from formtune.errors import Fault, Stopped, UserError


@dataclass(frozen=True, slots=True)
class Verb:
    """What can stand after `formtune`.

    Args:
        description: One line for the help.
        run: Function of the whole command line, verb included; imports what it needs, raises UserError, and may
            return an exit code.
    """

    description: str
    run: Callable[[list[str]], int | None]


def _configs(args: list[str]) -> list[str]:
    """The YAMLs that are named; a broken one is refused before anything slow is imported."""
    paths = []
    PLACES.clear()
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, attached = option.partition("=")
        if name in ("-c", "--config"):
            path = attached if equals else value
            if not path:
                raise UserError(f"{name}: name the YAML of a task")
            check_yaml(path)
            paths.append(path)
    for option in args:
        PLACES.pop(option.partition("=")[0].removeprefix("--"), None)  # what a file says of it counts no more
    return paths


def _sweep(args: list[str]) -> int:
    configs = _configs(args)
    from formtune.commands.sweep import run

    return run(args[1:], configs)


def _from(module: str, function: str = "run", task: bool = False, silent: bool = False) -> Callable[[list[str]], int]:
    """What runs a verb: a function of the words after it, imported only when it is called.

    Args:
        module: Where it stands in formtune.
        function: What it is called.
        task: Whether it takes the YAML of a task.
        silent: Whether libraries may not warn: of what is tried here and judged by what comes out.
    """

    def run(args: list[str]) -> int:
        if task:
            _configs(args)
        if silent:
            warnings.simplefilter("ignore")
        found: int = getattr(importlib.import_module(f"formtune.{module}"), function)(args[1:])
        return found

    return run


def _lightning(args: list[str]) -> None:
    _configs(args)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of calls inside other libraries
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)`.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged has been summed over processes already
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")  # of fit alone
    from formtune.commands.lightning_cli import run  # several seconds: torch, lightning, transformers

    run(args)


VERBS = {
    "audit": Verb(
        "Clean and judge the rows, and say what to know of them before training; needs no model.",
        _from("commands.audit", task=True),
    ),
    "synthesize": Verb(
        "Ask a teacher model for rows, and write those that keep the contract.", _from("commands.synthesize", task=True)
    ),
    "preflight": Verb(
        "Say before training whether its result can be merged, quantised and served.",
        _from("commands.preflight", task=True, silent=True),
    ),
    "fit": Verb("Evaluate the base, train the adapter, test the best checkpoint and export it.", _lightning),
    "sweep": Verb("Train at each point of a grid, ranks by default, and take the smallest that is as good.", _sweep),
    "validate": Verb("Evaluate a run's best checkpoint, another or the base on the validation rows.", _lightning),
    "test": Verb("Evaluate a run's best checkpoint, another or the base on the test rows.", _lightning),
    "predict": Verb("Answer a file of prompts and judge the answers by the contract.", _lightning),
    "compare": Verb(
        "Say which run is better on the same test rows, or that the rows cannot tell.", _from("commands.compare")
    ),
    "export": Verb(
        "Merge or quantise a run's adapter, and write what still answers as the adapter does.",
        _from("commands.export", silent=True),
    ),
    "promote": Verb(
        "Point a name such as production to a run, if its test rows are not worse.",
        _from("commands.promote", "promote"),
    ),
    "rollback": Verb("Point it to the version before again.", _from("commands.promote", "rollback")),
    "deployments": Verb("List what is deployed, and the history.", _from("commands.promote", "deployments")),
    "serve": Verb(
        "Serve a run or a deployment on this machine, or print the command for vLLM.", _from("deploy.server")
    ),
    "check-endpoint": Verb(
        "Ask a server the test rows, and judge what it answers and how fast.",
        _from("commands.check_endpoint", task=True),
    ),
}


def help_text() -> str:
    """What `formtune --help` prints."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: formtune VERB -c TASK.yaml [--key value ...]",
            "",
            "Fine-tune a language model so that its answers have exactly the declared format.",
            "",
            "verbs:",
            *(f"  {name:{width}}  {verb.description}" for name, verb in VERBS.items()),
            "",
            "options:",
            "  -h, --help  Show this; after a verb, every key that it takes",
            "  --version   Show the version",
            "",
            "examples:",
            "  formtune audit -c configs/demo.yaml",
            "  formtune fit -c configs/demo.yaml --model.lora.r 32",
            "  formtune fit -c configs/demo.yaml --print_config=skip_default",
            "  formtune compare logs/demo/r16 logs/demo/r32",
            "",
            "One YAML describes a task, and every key of it can be set on the command line too. README.md shows",
            "a whole run and how to begin with rows of your own; configs/ holds YAMLs to start from.",
        ]
    )


class _Output:
    """Standard output whose reader may leave (`| head`) without an end to the work.

    Args:
        stream: What it writes to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for a mistake, 1 for a fault, 128 and more for a signal."""
    args = sys.argv[1:] if args is None else args
    output: Any = _Output(sys.stdout or Path(os.devnull).open("w"))  # noqa: SIM115
    with contextlib.redirect_stdout(output):
        try:
            return _run(args)
        finally:
            output.flush()


def _run(args: list[str]) -> int:
    try:
        if not args:
            print(help_text(), file=sys.stderr)
            return 2
        if args[0] in ("-h", "--help"):
            print(help_text())
        elif args[0] == "--version":
            print(f"formtune {__version__}")
        else:
            return _verb(args[0]).run(args) or 0
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
    return 0


def _verb(name: str) -> Verb:
    if name not in VERBS:
        known = f"the verbs are {', '.join(VERBS)}"
        if name.startswith("-"):
            raise UserError(f"a verb comes first, before {name}; {known}")
        near = difflib.get_close_matches(name, VERBS, 1)
        raise UserError(f"no verb {name!r}; " + (f"did you mean {near[0]}?" if near else known))
    return VERBS[name]
