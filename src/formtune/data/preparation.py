"""A task's rows as its YAML describes them, and whether they may be trained on: the same for an audit and for a run.

Knows no model and no Lightning, so that an audit answers in seconds.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from datetime import date as calendar_day
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from formtune.base.folder import context_length
from formtune.base.renderer import Renderer, today
from formtune.base.row import Row, quantile
from formtune.data.blockers import bad_rows, empty_splits, uneven_shares
from formtune.data.cleaning import AnswerStep, Example, Step, repair
from formtune.data.encoded import Splits
from formtune.data.progress import shown
from formtune.data.sources import Columns, Source
from formtune.data.splits import SPLITS, Prepared, Splitter
from formtune.errors import UserError
from formtune.formats import Format


def system_prompt(system: str | None, contract: dict[str, Any]) -> str | None:
    """The system prompt with the schema in the place of `{schema}`.

    Args:
        system: As configured.
        contract: What the contract's `to_dict` gives, as an exported folder's `contract.json` holds it.

    Raises:
        UserError: The contract has no schema.
    """
    if not system or "{schema}" not in system:
        return system
    schema = contract["init_args"].get("schema")
    if schema is None:
        raise UserError("data.system: {schema} needs a JsonSchema as data.format")
    return system.replace("{schema}", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _checked_date(text: str) -> str:
    try:
        return calendar_day.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"data.date: {text!r} is no day; write it as YYYY-MM-DD") from None


class Preparation:
    """Reads, cleans and judges rows, splits them by hash and encodes them with a proven mask.

    Args:
        format: The contract that every answer must keep, the training answers first.
        train: File (.jsonl, .csv, .parquet), data set folder, hub id, or a Source.
        validation: The same for validation, or the share of train's inputs to split off.
        test: The same for the final test, or the share of train's inputs to split off.
        prompts: Inputs for `predict`: the same kinds as train, no answers needed.
        production: Inputs as production sends them, the same kinds: the rows must be like these.
        tokenizer: Model folder or hub id of the tokenizer (follows `model.base`).
        system: System prompt for rows that have none; `{schema}` in it stands for the contract's JSON Schema.
        columns: Which columns hold the conversation.
        clean: Repairs to run on inputs, here and in `predict`.
        repair_answers: Repairs to run on answers, where they then keep the contract; none by default.
        near_duplicates: Jaccard index of two inputs' runs of five characters from which on they are nearly the same;
            1 compares only what is the same but for case, marks and spacing.
        bad_rows: What to do when answers break the contract, mix styles or are too long: refuse to train, or drop and
            count.
        max_synthetic: Share of training rows that models may have written, of those whose `columns.source` says so.
        max_length: Tokens that prompt and answer may have together; longer rows are bad rows, they are never cut.
        max_new_tokens: Tokens that an answer may have (follows `model.max_new_tokens`).
        date: Day that a chat template writes where it writes today's, as YYYY-MM-DD; None takes the day the run began.
    """

    def __init__(
        self,
        format: Format,
        train: str | Source | None = None,
        validation: ClosedUnitInterval | str | Source = 0.1,
        test: ClosedUnitInterval | str | Source = 0.1,
        prompts: str | Source | None = None,
        production: str | Source | None = None,
        tokenizer: str = "",
        system: str | None = None,
        columns: Columns | None = None,
        clean: list[Step] = ["encoding", "unicode", "control", "edges"],  # noqa: B006 (jsonargparse shows it in --help)
        repair_answers: list[AnswerStep] = [],  # noqa: B006
        near_duplicates: ClosedUnitInterval = 0.8,
        bad_rows: Literal["refuse", "drop"] = "refuse",
        max_synthetic: ClosedUnitInterval = 0.5,
        max_length: PositiveInt = 1024,
        max_new_tokens: PositiveInt = 256,
        date: str | None = None,
    ) -> None:
        self.format, self.prompts, self.production = format, prompts, production
        self.system = system_prompt(system, format.to_dict())
        self.sources = (train, validation, test)
        self.base, self.columns = tokenizer, columns or Columns()
        self.clean, self.repair_answers, self.near_duplicates = clean, repair_answers, near_duplicates
        self.bad_rows, self.max_synthetic = bad_rows, max_synthetic
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.ignored: dict[str, Counter[str]] = {}  # of inputs without answers, by the option that names them
        if sum(share for share in (validation, test) if isinstance(share, float)) >= 1:
            raise UserError("data.validation, data.test: the two shares leave no rows to train on")
        self._day = today() if date is None else _checked_date(date)

    @property
    def renderer(self) -> Renderer:
        """Turns conversations into ids, on the day of the run."""
        return Renderer.load(self.base, self._day)

    @property
    def date(self) -> str | None:
        """Day that the chat template writes, None where it writes none."""
        return self.renderer.date

    @property
    def limit(self) -> int:
        """Tokens that a row may have: `max_length`, or the base's context if that is less."""
        return min(self.max_length, context_length(self.base) or self.max_length)

    def split(self) -> Splits:
        """Train, validation and test rows, from the cache where it has them.

        Raises:
            UserError: A file or a row cannot be read; names the file and line.
        """
        return self._splitter().split(*self._sources())

    def prepare(self) -> Prepared:
        """The same worked out anew, with the conversations."""
        return self._splitter().prepare(*self._sources())

    def examples(self) -> dict[str, list[Example]]:
        """The conversations of train, validation and test as read, inputs repaired; none where a share is split off."""
        splitter = self._splitter()
        found = {}
        for name, source in zip(SPLITS, self._sources(), strict=True):
            rows = [] if isinstance(source, float) else splitter.examples(source, True, Counter())
            found[name] = [Example(repair(e.messages, self.clean), e.where, e.origin) for e in rows]
        return found

    def encode_inputs(self, source: str | Source, key: str) -> list[Row]:
        """Rows without answers, such as the prompts to predict.

        Args:
            source: Where they come from.
            key: Name of the option that names them, for messages.

        Raises:
            UserError: There is none, or one cannot be rendered; names the file and line.
        """
        splitter = self._splitter()
        self.ignored[key] = Counter()
        examples = splitter.examples(source, False, self.ignored[key])
        coded = splitter.renderer.encode([(repair(e.messages, self.clean), e.where) for e in examples])
        rows = []
        for example, row in zip(examples, shown(coded, len(examples), "encoding"), strict=True):
            if not isinstance(row, Row):
                raise UserError(f"{example.where}: {row}; mend or remove the prompt")
            rows.append(row)
        if not rows:
            raise UserError(f"data.{key}: {source} holds no prompt")
        return rows

    @functools.cached_property
    def production_rows(self) -> list[Row]:
        """Production's inputs, none where the task names no file of them.

        Raises:
            UserError: As in `encode_inputs`.
        """
        return [] if self.production is None else self.encode_inputs(self.production, "production")

    def encode_prompts(self) -> list[Row]:
        """The prompts to predict, each short enough for an answer.

        Raises:
            UserError: As in `encode_inputs`, or one is too long.
        """
        if self.prompts is None:
            raise UserError("data.prompts: name a file of prompts to answer")
        rows = self.encode_inputs(self.prompts, "prompts")
        for row in rows:
            if len(row) >= self.limit:
                raise UserError(
                    f"{row.where}: the prompt has {len(row)} tokens, with an answer more than the limit of "
                    f"{self.limit}; raise data.max_length (the base's context bounds it) or shorten the prompt"
                )
        return rows

    def blockers(self, splits: Splits) -> list[str]:
        """Why the rows must not be trained on, each with the remedy; empty if they may."""
        shares = {n: s for n, s in zip(SPLITS, self.sources, strict=True) if isinstance(s, float)}
        found = []
        if self.bad_rows == "refuse":
            found += bad_rows(splits, self.format, self.limit if self.limit < self.max_length else None)
        if empty := empty_splits(splits, shares):
            found += empty
        else:
            found += uneven_shares(splits, shares)
        if not empty and self.production is not None:
            need = quantile([len(row) for row in self.production_rows], 95)
            answer = quantile([len(r.target) for r in splits.rows["train"]], 99)
            if need + answer > self.limit:
                found.append(
                    f"data.max_length: production's inputs have {need} tokens at P95 and answers {answer} at P99, "
                    f"together more than the limit of {self.limit}; raise data.max_length or take a base with more "
                    "context"
                )
        known = {name: count for name, count in splits.origins.get("train", {}).items() if name}
        written = sum(known.values()) - known.get("human", 0)
        if known and written > self.max_synthetic * sum(known.values()):
            found.append(
                f"data.max_synthetic: by their column `{self.columns.source}`, models wrote {written:,} of "
                f"{sum(known.values()):,} training rows, more than {self.max_synthetic:.0%}; add rows that people "
                "wrote, or raise it; if the column says something else, set data.columns.source: null"
            )
        return found

    def check(self, splits: Splits) -> None:
        """Refuse to train on rows that must not be trained on.

        Raises:
            UserError: The first reason, with the remedy.
        """
        if found := self.blockers(splits):
            more = f" (and {len(found) - 1} more: formtune audit lists all)" if len(found) > 1 else ""
            raise UserError(found[0] + more)

    def _sources(self) -> tuple[str | Source, float | str | Source, float | str | Source]:
        train, validation, test = self.sources
        if train is None:
            raise UserError("data.train: name a file to train on")
        return train, validation, test

    def _splitter(self) -> Splitter:
        return Splitter(
            self.format,
            self.renderer,
            self.columns,
            self.system,
            self.clean,
            self.repair_answers,
            self.near_duplicates,
            self.limit,
            self.max_new_tokens,
        )
