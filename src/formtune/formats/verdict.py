"""What a contract says of a text: problems with their kinds, in order of precedence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from formtune.formats.content import Comparison

# In order of precedence: a text's primary kind is the first that applies. 1 to 10 are failures of format.
KINDS = (
    "ok",
    "empty",
    "truncated",
    "extra_text",
    "syntax",
    "wrong_root",
    "missing_key",
    "extra_key",
    "wrong_type",
    "bad_value_form",
    "layout",
    "content",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a text does not keep its contract.

    Args:
        kind: One of `KINDS`.
        subkind: What exactly, such as `code_fence` or `null_not_allowed`.
        detail: One line for a person, with the path of the value.
    """

    kind: str
    subkind: str
    detail: str


class SyntaxProblem(ValueError):
    """Raised by `Format.parse` for a text that is no document of the format."""

    def __init__(self, subkind: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem("syntax", subkind, detail)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a contract says of one text.

    Args:
        problems: All problems found, the primary one first; empty if there are none.
        loose: Whether it would comply without fence, prose and think block around it.
        terminated: Whether a stop token ended it.
        no_extra_text: Whether there is a document and nothing else.
        parse: Whether there is a document, as it stands or within other text.
        schema: Whether that document keeps the schema.
        keys_exact: Whether that document has all required keys and none that is not allowed.
        canonical: Whether that document is written as it must be.
        value: The document found, as it stands or within other text; None if there is none.
        content: How the document compares with the wanted one, None where none was given.
    """

    problems: tuple[Problem, ...]
    loose: bool
    terminated: bool
    no_extra_text: bool
    parse: bool
    schema: bool
    keys_exact: bool
    canonical: bool
    value: Any
    content: Comparison | None

    @property
    def kind(self) -> str:
        """The primary kind."""
        return self.problems[0].kind if self.problems else "ok"

    @property
    def subkind(self) -> str:
        """The primary problem's subkind."""
        return self.problems[0].subkind if self.problems else ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that apply, in order of precedence."""
        return tuple(dict.fromkeys(p.kind for p in self.problems)) or ("ok",)

    @property
    def detail(self) -> str:
        """One line that says what is wrong."""
        return self.problems[0].detail if self.problems else ""

    @property
    def exact(self) -> bool:
        """Whether the format is kept: nothing is wrong, or only the content."""
        return self.kind in ("ok", "content")

    @property
    def joint(self) -> bool:
        """Whether the format is kept and the content is the wanted one."""
        return self.exact and self.content is not None and self.content.equal
