"""What happens around training: checkpoints, signals, telling overfitting, showing and writing answers."""

from formtune.callbacks.answers import AnswerFile, WorstAnswers
from formtune.callbacks.checkpoints import Checkpoints
from formtune.callbacks.data_table import DataTable
from formtune.callbacks.outcomes import Outcomes
from formtune.callbacks.overfitting import OverfittingWatch
from formtune.callbacks.progress_bar import ProgressBar
from formtune.callbacks.signals import Signals
from formtune.callbacks.validations import Validations

__all__ = [
    "AnswerFile",
    "Checkpoints",
    "DataTable",
    "Outcomes",
    "OverfittingWatch",
    "ProgressBar",
    "Signals",
    "Validations",
    "WorstAnswers",
]
