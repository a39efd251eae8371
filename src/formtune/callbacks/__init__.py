"""What happens around training: choosing the best checkpoint, telling overfitting, showing and writing answers."""

from formtune.callbacks.answers import AnswerFile, WorstAnswers
from formtune.callbacks.best_checkpoint import BestCheckpoint
from formtune.callbacks.data_table import DataTable
from formtune.callbacks.outcomes import Outcomes
from formtune.callbacks.overfitting import OverfittingWatch
from formtune.callbacks.progress_bar import ProgressBar

__all__ = ["AnswerFile", "BestCheckpoint", "DataTable", "Outcomes", "OverfittingWatch", "ProgressBar", "WorstAnswers"]
