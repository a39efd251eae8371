"""`formtune train`, `fit`, `validate`, `test` and `predict`."""

import logging
import os
import threading
import time
import warnings
from pathlib import Path

from formtune.commands import COMMANDS
from formtune.configuration.parsing import short_help
from formtune.configuration.yaml_file import check_configs
from formtune.errors import Fault, UserError, first_line

LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "Broken pipe")  # in messages
QUIET = (
    ".*does not have many workers.*",
    ".*your dataloader is not resumable.*",  # `ResumableSampler` resumes it
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*args parameter is intended to run from within Python.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # values are summed over all processes before they are logged
    ".*callbacks used to create the checkpoint need to be provided.*",  # by fit alone
    ".*dirpath has changed from.*",  # of a user's own checkpoints, in an evaluation
    ".*ModelCheckpoint with manual optimization.*",  # a step is complete when a callback sees it
)


def run(command: str, args: list[str]) -> None:
    if {"-h", "--help"} & set(args):
        print(short_help(command, COMMANDS[command].description))
        return
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from formtune.commands.formtune_cli import FormtuneCLI  # several seconds: torch, lightning, transformers
    from formtune.training.callbacks import Signals

    if not args:
        raise UserError(f"name a task, -c TASK.yaml{'' if command in ('train', 'fit') else ', or a run'}")
    args = ["--help" if word == "--help-all" else word for word in _with_named_run(command, args)]
    check_configs(args)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # from calls inside libraries
    # Lightning's notes on hardware and on its other products; warnings still come through.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks"):  # what a user asks for: a profile, `verbose`, the end of a Timer
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    # TensorBoard's writer fails in a thread, and again where the next value is logged.
    hook = threading.__excepthook__
    threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) else hook(failure)
    signals = Signals()
    signals.install()
    try:
        FormtuneCLI([command, *args], signals)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        name, remedy = os.fsdecode(error.filename or "a file"), "fix this and continue with --resume"
        raise Fault(f"{name}: {error.strerror}" + f"; {remedy}" * (command in ("train", "fit"))) from error
    except RuntimeError as error:
        if "conditioned on metric" in str(error):  # EarlyStopping, on a custom metric
            raise UserError(f"trainer.callbacks: {first_line(error)}") from None
        if not any(words in str(error) for words in LOST_CONNECTION):
            raise
        time.sleep(1)  # the failed process prints its message first
        message = "another process of this run ended or was killed; see its message, and continue with --resume"
        raise Fault(message) from error
    finally:
        threading.excepthook = hook
        signals.restore()
        os.environ.pop("FORMTUNE_RUN", None)  # the next call in this process is another run


def _with_named_run(command: str, args: list[str]) -> list[str]:
    """The command line with `RUN` replaced by its configuration, and `PROMPTS` (for `predict`) by their key."""
    if not args or command in ("train", "fit") or args[0].startswith("-"):
        return args
    config, words, prompts = Path(args[0], "config.yaml"), args[1:], []
    if not config.is_file():
        raise UserError(f"{args[0]}: not a run (no config.yaml); name its folder, such as logs/demo/RUN")
    if not (config.parent / "checkpoints").is_dir():
        remedy = f"-c {config} --model.adapter {args[0]} uses its adapter, -c {config} alone the base"
        if not (config.parent / "adapter").is_dir():
            remedy = f"continue it with formtune train -c {config} --run {config.parent.name} --resume"
        raise UserError(f"{args[0]}: the run has no checkpoints; {remedy}")
    if command == "predict" and words and not words[0].startswith("-"):
        prompts = ["--data.prompts", words.pop(0)]
    return ["-c", str(config), *prompts, *words]
