"""Formats: what an answer must look like, and a verdict on every text. Imports neither torch nor lightning.

One format judges the training targets, the model's answers in validation and the answers of `predict`.
For your own format, subclass `Format` and name the class in YAML; it needs only `parse`.
"""

from formtune.formats.format import KINDS, Format, Problem, SyntaxProblem, Verdict
from formtune.formats.json_schema import JsonSchema
from formtune.formats.reasoning import Reasoning
from formtune.formats.text import Labels, Regex, Tagged
from formtune.formats.tool_calls import ToolCalls

__all__ = ["KINDS", "Format", "JsonSchema", "Labels", "Problem", "Reasoning", "Regex", "SyntaxProblem"]
__all__ += ["Tagged", "ToolCalls", "Verdict"]
