"""Format contracts: what an answer must look like, and a verdict on every text. Imports neither torch nor lightning.

One contract judges the training answers, the model's answers in validation and the answers of `predict`.
Subclass `Format` for a format of your own and name the class in YAML; `parse` is all it needs.
"""

from formtune.formats.format import Format
from formtune.formats.json_schema import JsonSchema
from formtune.formats.text import Labels, Regex, Tagged
from formtune.formats.verdict import KINDS, Problem, SyntaxProblem, Verdict

__all__ = ["KINDS", "Format", "JsonSchema", "Labels", "Problem", "Regex", "SyntaxProblem", "Tagged", "Verdict"]
