"""Formats: what an answer must look like, and a verdict on every text. Imports neither torch nor lightning."""

from formtune.formats.format import KINDS, Format, Problem, SyntaxProblem, Verdict
from formtune.formats.json_schema import JsonSchema
from formtune.formats.text import Labels, Reasoning, Regex, Tagged
from formtune.formats.tool_calls import ToolCalls

__all__ = ["KINDS", "Format", "JsonSchema", "Labels", "Problem", "Reasoning", "Regex", "SyntaxProblem"]
__all__ += ["Tagged", "ToolCalls", "Verdict"]
