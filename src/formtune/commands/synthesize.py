"""`formtune synthesize`: rows from a teacher model, each checked against the format before it is written.

A teacher is any server of OpenAI's chat completions, local ones included. It sees the task, the format and a few
existing rows, and writes new ones. The same command continues an interrupted file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.data.cleaning import Example, repair
from formtune.data.duplicates import similar
from formtune.data.preparation import read_splits
from formtune.data.progress import shown
from formtune.data.settings import DataSettings
from formtune.data.sources import read_records
from formtune.errors import UserError, first_line
from formtune.files import write_lines
from formtune.formats.strict_json import loads_strict

ASKED = 8  # rows that the teacher is asked for in one request
EXAMPLES = 4  # rows that it sees
PATIENCE = 12  # replies without a new row, one after the other, that end the run
RETRIES = 5  # of a request that fails because of the server or the network


class Teacher:
    """Asks a model at an endpoint for rows of a task, and shows it a few examples each time."""

    def __init__(self, config: Namespace, settings: DataSettings, examples: list[Example]) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("formtune synthesize needs the extra: pip install -e '.[synthesize]'") from None
        self._error = openai.APIError
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
        self._client = openai.OpenAI(base_url=config.endpoint, api_key=key, max_retries=RETRIES)
        self._config, self._settings, self._examples = config, settings, examples

    def replies(self, first: int, at_once: int) -> Iterator[str]:
        """The replies to request `first` and all later ones."""
        with ThreadPoolExecutor(at_once) as pool:
            for start in itertools.count(first, at_once):
                yield from pool.map(self._ask, range(start, start + at_once))

    def _ask(self, number: int) -> str:
        try:
            reply = self._client.chat.completions.create(
                model=self._config.teacher, messages=[{"role": "user", "content": self._request(number)}],
                temperature=self._config.temperature, seed=number,
            )  # fmt: skip
        except self._error as error:
            raise UserError(f"endpoint: {self._config.endpoint} gave no rows: {first_line(error)}") from None
        return (reply.choices[0].message.content or "") if reply.choices else ""

    def _request(self, number: int) -> str:
        """The text of a request; its number decides the rows that the teacher sees."""
        system, format = self._settings.system, self._settings.format.to_dict()
        examples = random.Random(number).sample(self._examples, min(EXAMPLES, len(self._examples)))
        rows = (json.dumps({"prompt": e.input, "completion": e.target}, ensure_ascii=False) for e in examples)
        return "\n\n".join(
            [
                "You write training data for a small language model. It gets an input and must answer in one fixed "
                "format that a program reads.",
                f"The model's instructions:\n{system}" if system else "",
                f"The format that every answer must keep:\n{json.dumps(format['init_args'], ensure_ascii=False)}",
                "Rows that exist:\n" + "\n".join(rows),
                f"Write {ASKED} new rows in the same two keys, one JSON object a line and nothing else. Vary people, "
                "places, subjects, length, tone and spelling as real inputs do; do not repeat the rows above. Put into "
                "an answer only what its input says. The completion is a string, JSON answers too.",
            ]
        ).strip()


def read_reply(reply: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a teacher's reply, one a line; fences, prose and broken lines are skipped."""
    for line in reply.splitlines():
        with contextlib.suppress(ValueError):
            record: Any = loads_strict(line.strip().rstrip(","))
            if isinstance(record, dict):
                yield record


class RowFilter:
    """Accepts rows with a valid format and a new input, and counts the others by their reason."""

    def __init__(self, settings: DataSettings, teacher: str, inputs: list[str]) -> None:
        self._format, self._threshold, self._inputs = settings.format, settings.near_duplicates, inputs
        self._source = {settings.columns.source or "source": teacher}
        self.refused: Counter[str] = Counter()

    def rows(self, replies: Iterable[str]) -> Iterator[dict[str, str]]:
        """The accepted rows; ends after `PATIENCE` replies without one."""
        without = 0
        for reply in replies:
            without += 1
            for record in read_reply(reply):
                row = self._row(record)
                if isinstance(row, str):
                    self.refused[row] += 1
                else:
                    without = 0
                    yield row
            if without == PATIENCE:
                return

    def _row(self, record: dict[str, Any]) -> dict[str, str] | str:
        """The row to write, or why it is refused."""
        prompt, completion = record.get("prompt"), record.get("completion")
        if isinstance(completion, dict | list):  # a string was asked for; the content is the same
            completion = self._format.write(completion)
        if not isinstance(prompt, str) or not isinstance(completion, str) or not prompt.strip():
            return "not a row"
        verdict = self._format.check(completion)
        if not verdict.exact:
            return f"invalid format: {verdict.kind}"
        key = _key(prompt)
        if near(key, self._inputs, self._threshold):
            return "near-duplicate"
        self._inputs.append(key)
        return {"prompt": prompt, "completion": completion, **self._source}


def near(text: str, texts: list[str], threshold: float) -> bool:
    """Whether a text is nearly one of the others; it is compared with all, which is fast beside a teacher's reply."""
    right = np.arange(1, len(texts) + 1)
    return bool((similar([text, *texts], np.zeros_like(right), right) >= threshold).any())


def _key(prompt: str) -> str:
    return Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}], "").key


def run(command: str, args: list[str]) -> int:
    """Ask, check, write; 1 if the teacher stopped bringing new rows before there were enough."""
    parser = task_parser(command, COMMANDS[command].description)
    parser.add_argument("--endpoint", type=str, required=True, help="Base URL, such as http://localhost:8000/v1; the "
                        "key, where one is needed, is read from OPENAI_API_KEY")  # fmt: skip
    parser.add_argument("--teacher", type=str, required=True, help="Name of the model to ask; goes into the column "
                        "that data.columns.source names")  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="File of JSON Lines to write or to continue")
    parser.add_argument("--rows", type=PositiveInt, default=500, help="Rows that the file is to have")
    parser.add_argument("--temperature", type=NonNegativeFloat, default=1.0, help="Randomness of the teacher's words")
    parser.add_argument("--at_once", type=PositiveInt, default=4, help="Requests at the same time")
    config, settings = read_task(parser, args)
    if settings.format.per_row:
        raise UserError("data.format: a teacher needs one schema for all rows; set data.format.init_args.schema")
    path = Path(config.out)
    rows = [row for row, _ in read_records(config.out)] if path.is_file() else []
    if not all(isinstance(row.get("prompt"), str) for row in rows):
        raise UserError(f"--out: {path} does not hold rows of formtune synthesize; choose another file")
    examples, _ = read_splits(settings)
    # A synthetic row must not repeat one of validation or test either.
    for example in itertools.chain(*examples.values()):
        example.messages = repair(example.messages, settings.clean)
    inputs = [example.key for example in itertools.chain(*examples.values())] + [_key(row["prompt"]) for row in rows]
    good = [example for example in examples["train"] if settings.format.check(example.target).exact]
    if not good:
        raise UserError("data.train: no row has a valid format, and the teacher must see some; fix them first")
    teacher = Teacher(config, settings, good)
    row_filter, missing = RowFilter(settings, config.teacher, inputs), max(config.rows - len(rows), 0)
    # Numbered from the rows that are there: a continued run sends other requests.
    new = row_filter.rows(teacher.replies(len(rows), config.at_once))
    for row in shown(itertools.islice(new, missing), missing, f"asking {config.teacher}"):
        rows.append(row)
        write_lines(path, rows)
        missing -= 1
    refused = ", ".join(f"{count:,} {reason}" for reason, count in row_filter.refused.most_common())
    print(f"{path}: {len(rows):,} rows" + (f"; refused: {refused}" if refused else ""))
    if settings.columns.source is None:
        print("who wrote a row is read once the task names its column: data.columns.source: source")
    if missing:
        print(f"stopped: {PATIENCE} replies brought nothing new; raise --temperature, or show more varied rows")
    return int(missing > 0)
