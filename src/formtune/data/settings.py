"""The YAML's `data` group: where a task's rows come from and how they are prepared."""

import functools
import json
from collections import Counter
from datetime import date as calendar_date
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from formtune.base.folder import context_length
from formtune.base.renderer import Renderer, read_template, today
from formtune.data.cleaning import AnswerStep, Step
from formtune.data.columns import Columns
from formtune.data.sources import Source, read_weights
from formtune.errors import UserError, as_user_error
from formtune.formats import Format
from formtune.formats.json_schema import PER_ROW


def system_prompt(system: str | None, format: dict[str, Any]) -> str | None:
    """The system prompt with the schema of `format`, as its `to_dict` gives it, in place of `{schema}`."""
    while isinstance(format["init_args"].get("format"), dict):  # the format of the answer after the reasoning
        format = format["init_args"]["format"]
    schema = format["init_args"].get("schema")
    if not system or "{schema}" not in system or schema == PER_ROW:  # then `DataSettings.system_of` replaces it
        return system
    if schema is None:
        raise UserError("data.system: {schema} needs a JsonSchema as data.format")
    return system.replace("{schema}", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


class DataSettings:
    """Where the rows come from, how they are cleaned, and which of them are used.

    Args:
        format: The format that every answer must have, training targets included.
        train: File (.jsonl, .json, .csv, .tsv, .parquet, also compressed), folder or glob of such files, or a list of
            these, each alone or as `{path: FILE, weight: 2.5}`; a dataset folder, Hub id, or a Source.
        validation: As train, for validation; or a fraction of train's inputs to split off.
        test: As train, for the final test; or a fraction of train's inputs to split off.
        prompts: Inputs for `predict`, of the same kinds as train; no answers needed.
        production: Inputs from production, of the same kinds as train, to compare the rows with.
        tokenizer: Model folder or Hub id of the tokenizer (follows `model.base`).
        chat_template: File of a chat template that replaces the tokenizer's (follows `model.chat_template`).
        system: System prompt for rows that have none; `{schema}` in it is replaced by the format's JSON Schema.
        columns: Columns of the conversation; known layouts, such as ShareGPT's, are recognized without it.
        train_on: The last answer of a conversation, or all: each is then a separate row, in every split.
        group: Column, such as a customer id; rows with equal values stay in one split.
        split_column: Column of train that names the split of a row, instead of fractions: train, validation or test.
        clean: Cleaning steps for inputs, here and in `predict`.
        repair_answers: Repairs of answers, made only if the answer then has a valid format.
        near_duplicates: Jaccard index of character 5-grams from which two inputs are near-duplicates; with 1, they must
            be equal up to case, punctuation and spacing.
        bad_rows: If answers break the format, mix styles or are too long: refuse to train, or drop the rows.
        max_synthetic: Maximum fraction of rows written by models, among the training rows with a `columns.source`.
        max_length: Maximum tokens of prompt and answer together; longer rows are bad rows and never truncated.
        max_new_tokens: Maximum tokens of an answer (follows `model.max_new_tokens`).
        max_evaluation_rows: Maximum of validation and of test rows, the same ones in every run; None uses all.
        date: Date that a chat template writes as today's, YYYY-MM-DD; None takes the date on which the run began.
    """

    def __init__(
        self,
        format: Format,
        train: list[str | dict[str, Any]] | str | Source | None = None,
        validation: ClosedUnitInterval | list[str] | str | Source = 0.1,
        test: ClosedUnitInterval | list[str] | str | Source = 0.1,
        prompts: list[str] | str | Source | None = None,
        production: list[str] | str | Source | None = None,
        tokenizer: str = "",
        chat_template: str | None = None,
        system: str | None = None,
        columns: Columns | None = None,
        train_on: Literal["last", "all"] = "last",
        group: str | None = None,
        split_column: str | None = None,
        clean: list[Step] = ["encoding", "unicode", "control", "edges"],  # noqa: B006 (jsonargparse shows it in --help)
        repair_answers: list[AnswerStep] = [],  # noqa: B006
        near_duplicates: ClosedUnitInterval = 0.8,
        bad_rows: Literal["refuse", "drop"] = "refuse",
        max_synthetic: ClosedUnitInterval = 0.5,
        max_length: PositiveInt = 1024,
        max_new_tokens: PositiveInt = 256,
        max_evaluation_rows: PositiveInt | None = None,
        date: str | None = None,
    ) -> None:
        # An input in several splits stays in the first, in this order.
        files, self.weights = read_weights(train)
        self.sources: dict[str, Any] = {"test": test, "validation": validation, "train": files}
        fractions = {"validation": validation, "test": test}
        self.fractions = {name: fraction for name, fraction in fractions.items() if isinstance(fraction, float)}
        if sum(self.fractions.values()) >= 1:
            raise UserError("data.validation, data.test: the two fractions leave no rows to train on")
        self.format, self.prompts, self.production, self.base = format, prompts, production, tokenizer
        self.system, self.columns = system_prompt(system, format.to_dict()), columns or Columns()
        self.template, self.train_on, self.group = read_template(chat_template), train_on, group
        self.split_column = split_column
        self.clean, self.repair_answers, self.near_duplicates = clean, repair_answers, near_duplicates
        self.bad_rows, self.max_synthetic = bad_rows, max_synthetic
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.max_evaluation_rows = max_evaluation_rows
        with as_user_error(f"data.date: {date!r} is not a date", "; write it as YYYY-MM-DD"):
            self._date = calendar_date.fromisoformat(today() if date is None else date).isoformat()
        self.ignored: dict[str, Counter[str]] = {}  # columns of `prompts` and `production` that were not read

    def system_of(self, schema: str | None) -> str | None:
        """The system prompt of a row that has this schema."""
        return self.system.replace("{schema}", schema) if self.system and schema is not None else self.system

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Turns conversations into token ids, on the day of the run."""
        return Renderer.load(self.base, self._date, self.template, self.format.tags)

    @property
    def date(self) -> str | None:
        """The date that the chat template writes, None if it writes none."""
        return self.renderer.date

    @functools.cached_property
    def limit(self) -> int:
        """Tokens that a row may have: `max_length`, or the base's context if that is less."""
        return min(self.max_length, context_length(self.base) or self.max_length)
