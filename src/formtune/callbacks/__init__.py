"""What happens around training: choosing the best checkpoint, showing answers, writing predictions."""

from formtune.callbacks.answers import AnswerFile, WorstAnswers
from formtune.callbacks.best_checkpoint import BestCheckpoint
from formtune.callbacks.data_table import DataTable
from formtune.callbacks.outcomes import Outcomes
from formtune.callbacks.progress_bar import ProgressBar

__all__ = ["AnswerFile", "BestCheckpoint", "DataTable", "Outcomes", "ProgressBar", "WorstAnswers"]
