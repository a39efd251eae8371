"""Which weights `validate`, `test` and `predict` measure: a run's best checkpoint, another one, or the untuned base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from formtune.errors import UserError
from formtune.training import checkpoint_files
from formtune.training.validations import Validations

UNTUNED = "untuned base"
CHECKPOINTS = "checkpoints"  # folder of a run
HELP = (
    "Weights to measure: best, the best checkpoint of the run that -c RUN/config.yaml or --run names (the default with "
    "a run); last, its newest one; base, the untuned base (the default without a run); or a checkpoint's file"
)


def run_of(configs: Sequence[Path], named: Path | None) -> Path | None:
    """The folder of the run that is to be measured, None where the command line names none.

    Args:
        configs: The YAML files of the command line.
        named: Folder that `--run` names.
    """
    folders = [*([named] if named else []), *(path.parent for path in reversed(configs) if path.name == "config.yaml")]
    return next((one for one in folders if (one / "config.yaml").is_file() and (one / CHECKPOINTS).is_dir()), None)


def choose(asked: str | None, run: Path | None) -> Path | None:
    """The checkpoint to measure, None for the untuned base.

    Args:
        asked: `best`, `last`, `base` or a file; None for a run's best, or the base where there is no run.
        run: The run's folder.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    if asked == "base" or (asked is None and run is None):
        return None
    if asked not in (None, "best", "last"):
        path = Path(str(asked))
    elif run is None:
        raise UserError(f"ckpt_path: {asked} of which run? Give its configuration: -c logs/TASK/RUN/config.yaml")
    else:
        path = _last(run) if asked == "last" else _best(run)
    checkpoint_files.read(path)
    return path


def _last(run: Path) -> Path:
    found = list(checkpoint_files.steps(run / CHECKPOINTS).values())
    if not found:
        raise UserError(f"ckpt_path: {run / CHECKPOINTS} holds no checkpoint yet; --ckpt_path base measures the base")
    return found[-1]


def _best(run: Path) -> Path:
    """The checkpoint that the run's result names or, before its end, the best validation that its newest one knows."""
    try:
        step = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["training"]["best_step"]
    except FileNotFoundError:
        known = Validations()
        try:
            known.load_state_dict(checkpoint_files.read(_last(run))["callbacks"][known.state_key])
            step = known.best.step if known.best else None
        except (KeyError, TypeError, ValueError):  # of another version
            step = None
    except (OSError, ValueError, TypeError, KeyError):
        step = None
    path = run / CHECKPOINTS / f"step-{step}.ckpt"
    if not path.is_file():
        there = ", ".join(one.name for one in checkpoint_files.steps(run / CHECKPOINTS).values()) or "none"
        raise UserError(
            f"ckpt_path: {run} has no best checkpoint; take one of {run / CHECKPOINTS} by --ckpt_path PATH ({there}), "
            "or measure the untuned base by --ckpt_path base"
        )
    return path
