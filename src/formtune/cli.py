"""The entry: verbs, help, exit codes. Knows the verbs but imports none, so that help and mistakes answer at once."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Rows are tokenised once and up front; a fork after that would print a warning at every start of a worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from formtune import __version__
from formtune.errors import UserError
from formtune.yaml_file import check_yaml


@dataclass(frozen=True, slots=True)
class Verb:
    """What can stand after `formtune`.

    Args:
        description: One line for the help.
        run: Function of the whole command line, verb included; imports what it needs, and raises UserError.
    """

    description: str
    run: Callable[[list[str]], None]


def _lightning(args: list[str]) -> None:
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, attached = option.partition("=")
        if name in ("-c", "--config"):
            path = attached if equals else value
            if not path:
                raise UserError(f"{name}: name the YAML of a task")
            check_yaml(path)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of calls inside other libraries
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)`.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    from formtune.lightning_cli import run  # several seconds: torch, lightning, transformers

    run(args)


VERBS = {
    "fit": Verb("Evaluate the base, train the adapter, test the best checkpoint and export it.", _lightning),
    "validate": Verb("Evaluate a checkpoint (or the base) on the validation rows.", _lightning),
    "test": Verb("Evaluate a checkpoint (or the base) on the test rows.", _lightning),
    "predict": Verb("Answer a file of prompts and judge the answers by the contract.", _lightning),
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
            "  formtune fit -c configs/demo.yaml --model.lora.r 32",
            "  formtune fit -c configs/demo.yaml --print_config=skip_default",
            "",
            "One YAML describes a task, and every key of it can be set on the command line too. README.md shows",
            "a whole run and how to begin with rows of your own; configs/ holds YAMLs to start from.",
        ]
    )


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for a mistake of the user's."""
    args = sys.argv[1:] if args is None else args
    try:
        if not args:
            print(help_text(), file=sys.stderr)
            return 2
        if args[0] in ("-h", "--help"):
            print(help_text())
        elif args[0] == "--version":
            print(f"formtune {__version__}")
        else:
            _verb(args[0]).run(args)
    except UserError as error:
        print(f"formtune: error: {error}", file=sys.stderr)
        return 2
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
