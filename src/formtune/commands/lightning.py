"""`formtune train`, `fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.commands.keys import short_help
from formtune.errors import Fault, UserError, first_line

LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "Broken pipe")  # in messages
QUIET = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*args parameter is intended to run from within Python.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # what is logged was summed over all processes already
    ".*callbacks used to create the checkpoint need to be provided.*",  # by fit alone
    ".*ModelCheckpoint with manual optimization.*",  # a step is complete when a callback sees it
)


def with_named_run(command: str, args: list[str]) -> list[str]:
    """The command line with `RUN` replaced by its configuration, and for `predict` `PROMPTS` by their key."""
    words = list(args)
    if words and command not in ("train", "fit") and not words[0].startswith("-"):
        run = words.pop(0)
        if not Path(run, "config.yaml").is_file():
            raise UserError(f"{run}: no run is there (no config.yaml); name its folder, such as logs/demo/RUN")
        prompts = []
        if command == "predict" and words and not words[0].startswith("-"):
            prompts = ["--data.prompts", words.pop(0)]
        return ["-c", str(Path(run, "config.yaml")), *prompts, *words]
    return words


def run(command: str, args: list[str]) -> None:
    """Run `train`, `fit`, `validate`, `test` or `predict`.

    Raises:
        UserError: A user's mistake, in one line.
        Fault: The disk, the network or another process failed.
    """
    if {"-h", "--help"} & set(args):
        print(short_help(command, COMMANDS[command].description))
        return
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from formtune.commands.formtune_cli import FormtuneCLI  # several seconds: torch, lightning, transformers
    from formtune.training.signals import Signals

    args = ["--help" if word == "--help-all" else word for word in with_named_run(command, args)]
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # from calls inside libraries
    # Lightning's notes on hardware and on its other products; warnings still come through.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signals = Signals()
    signals.install()
    # TensorBoard's writer fails in its own thread, and once more, in order, in the one that writes next.
    threading.excepthook = lambda a: None if issubclass(a.exc_type, OSError) else threading.__excepthook__(a)
    try:
        FormtuneCLI([command, *args], signals)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if "Problem with given class_path" not in str(error):
            raise
        # jsonargparse tries every type that a key may have; the class that was named says what is wrong.
        named = str(error).partition("Problem with given class_path ")[2].split("\n    - ")[0].split("\n  - ")[0]
        raise UserError(f"{' '.join(named.split())}") from error
    except OSError as error:
        if error.errno is None:
            raise
        name = error.filename.decode() if isinstance(error.filename, bytes) else error.filename or "a file"
        raise Fault(f"{name}: {error.strerror}; fix this and continue with --resume") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        time.sleep(1)  # the process that failed prints its own line, and first
        raise Fault(f"another process of this run ended, see its message ({first_line(error)[:80]})") from error
    finally:
        threading.excepthook = threading.__excepthook__
        signals.restore()
        for name in ("FORMTUNE_RUN", "FORMTUNE_DATE"):
            os.environ.pop(name, None)  # the next call in this process is another run
