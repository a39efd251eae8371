"""The training pipeline, and the callbacks and files around a run."""

from typing import Any, TypeVar

T = TypeVar("T")


def callback(trainer: Any, kind: type[T]) -> T:
    """The trainer's callback of a class, or a new one that the trainer does not call."""
    return next((item for item in trainer.callbacks if isinstance(item, kind)), None) or kind()
