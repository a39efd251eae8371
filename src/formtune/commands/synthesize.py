"""`formtune synthesize`: rows from a teacher model, each checked against the format before it is written.

A teacher is any server of OpenAI's chat completions, local ones included. It sees the task, the format and a few
existing rows, and writes new ones. A row is kept if its format is valid and its input is not a near-duplicate. The
column that `data.columns.source` names (`source` if it names none) holds the teacher's name, so that an audit can tell
these rows apart. The file grows row by row; the same command continues an interrupted one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from formtune.commands import COMMANDS
from formtune.configuration.task import read_task, task_parser
from formtune.data.cleaning import Example, repair
from formtune.data.duplicates import bands, similar
from formtune.data.preparation import read_splits
from formtune.data.settings import DataSettings
from formtune.errors import UserError, first_line
from formtune.formats.strict_json import loads_strict

ASKED = 8  # rows that the teacher is asked for in one request
EXAMPLES = 4  # rows that it sees
PATIENCE = 12  # replies without a new row, one after the other, that end the run
RETRIES = 5  # of a request that fails because of the server or the network


class KnownInputs:
    """Tells whether an input is new, by a Jaccard index below the threshold to all that were added before."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._keys: dict[str, int] = {}
        self._buckets: dict[tuple[int, int], list[int]] = {}

    def add(self, key: str) -> bool:
        """Add an input if it is new, and say whether it was."""
        if key in self._keys:
            return False
        buckets: list[list[int]] = []
        if self.threshold < 1:
            marks = enumerate(bands([key], self.threshold)[0].tolist())
            buckets = [self._buckets.setdefault(mark, []) for mark in marks]
            candidates = sorted({i for bucket in buckets for i in bucket})
            texts = [key, *map(list(self._keys).__getitem__, candidates)] if candidates else []
            right = np.arange(1, len(texts))
            if len(right) and (similar(texts, np.zeros_like(right), right) >= self.threshold).any():
                return False
        self._keys[key] = len(self._keys)
        for bucket in buckets:
            bucket.append(self._keys[key])
        return True


class Teacher:
    """Asks a model at an endpoint for rows of a task, and shows it a few examples each time."""

    def __init__(
        self, endpoint: str, name: str, temperature: float, settings: DataSettings, examples: list[Example]
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("formtune synthesize needs the extra: pip install -e '.[synthesize]'") from None
        self._errors = openai.APIError
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
        self._client = openai.OpenAI(base_url=endpoint, api_key=key, max_retries=RETRIES)
        self.endpoint, self.name, self.temperature = endpoint, name, temperature
        self._settings, self._examples = settings, examples

    def ask(self, number: int) -> str:
        """The teacher's reply to request `number`, which decides the rows that it is shown."""
        try:
            reply = self._client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": self._request(number)}],
                temperature=self.temperature,
                seed=number,
            )
        except self._errors as error:
            raise UserError(f"endpoint: {self.endpoint} gave no rows: {first_line(error)}") from None
        return (reply.choices[0].message.content or "") if reply.choices else ""

    def _request(self, number: int) -> str:
        task, format = self._settings, self._settings.format.to_dict()
        examples = random.Random(number).sample(self._examples, min(EXAMPLES, len(self._examples)))
        rows = (json.dumps({"prompt": e.input, "completion": e.target}, ensure_ascii=False) for e in examples)
        return "\n\n".join(
            [
                "You write training data for a small language model. It gets an input and must answer in one fixed "
                "format that a program reads.",
                f"The model's instructions:\n{task.system}" if task.system else "",
                f"The format that every answer must keep:\n{json.dumps(format['init_args'], ensure_ascii=False)}",
                "Rows that exist:\n" + "\n".join(rows),
                f"Write {ASKED} new rows in the same two keys, one JSON object a line and nothing else. Vary people, "
                "places, subjects, length, tone and spelling as real inputs do; do not repeat the rows above. Put into "
                "an answer only what its input says. The completion is a string, JSON answers too.",
            ]
        ).strip()


def read_reply(reply: str) -> Iterator[dict[str, Any] | None]:
    """The rows in a teacher's reply, None for a line that is not a whole one; fences and prose are skipped."""
    for line in reply.splitlines():
        text = line.strip().rstrip(",")
        if not text.startswith("{"):
            continue
        try:
            yield loads_strict(text)
        except ValueError:
            yield None


class RowFilter:
    """Decides which rows are written, and counts the others by their reason."""

    def __init__(self, settings: DataSettings, teacher: str, known: KnownInputs) -> None:
        self._format, self._known = settings.format, known
        self._source = {settings.columns.source or "source": teacher}
        self.refused: Counter[str] = Counter()

    def rows(self, reply: str) -> Iterator[dict[str, str]]:
        """The rows of a reply that may be written."""
        for record in read_reply(reply):
            row = self._row(record)
            if isinstance(row, dict):
                yield row
            else:
                self.refused[row] += 1

    def _row(self, record: dict[str, Any] | None) -> dict[str, str] | str:
        prompt, completion = (record or {}).get("prompt"), (record or {}).get("completion")
        if isinstance(completion, dict | list):  # a string was asked for; the content is the same
            completion = self._format.write(completion)
        if not isinstance(prompt, str) or not isinstance(completion, str) or not prompt.strip():
            return "not a row"
        verdict = self._format.check(completion)
        if not verdict.exact:
            return f"invalid format: {verdict.kind}"
        if not self._known.add(_example(prompt).key):
            return "near-duplicate"
        return {"prompt": prompt, "completion": completion, **self._source}


def _example(prompt: str) -> Example:
    return Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}], "")


def read_written(path: Path) -> list[dict[str, Any]]:
    """The rows that an earlier run wrote; an unfinished last line is removed from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(loads_strict(line.decode()))
            if not isinstance(rows[-1]["prompt"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a row of formtune synthesize; choose another --out") from None
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return rows


def collect(teacher: Teacher, row_filter: RowFilter, path: Path, have: int, want: int, at_once: int) -> int:
    """Ask until the file, which has `have` rows, has `want`, or nothing new comes; returns its rows."""
    columns = (TextColumn("asking {task.fields[teacher]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=want, completed=have, teacher=teacher.name)
    request, idle = have, 0  # a continued run asks other questions
    with bar, path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(at_once) as pool:
        waiting: set[Future[str]] = set()
        try:
            while have < want and idle < PATIENCE:
                while len(waiting) < at_once:
                    waiting.add(pool.submit(teacher.ask, request))
                    request += 1
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for reply in done:
                    before = have
                    for row in row_filter.rows(reply.result()):
                        if have < want:
                            file.write(json.dumps(row, ensure_ascii=False) + "\n")
                            have += 1
                    file.flush()
                    os.fsync(file.fileno())
                    idle = 0 if have > before else idle + 1
                    bar.update(task, completed=have)
        finally:
            for future in waiting:
                future.cancel()
    return have


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
    path = Path(config.out)
    written = read_written(path)
    examples, _ = read_splits(settings)
    known = KnownInputs(settings.near_duplicates)
    # A synthetic row must not repeat one of validation or test either.
    for example in itertools.chain(*examples.values()):
        example.messages = repair(example.messages, settings.clean)
        known.add(example.key)
    for row in written:
        known.add(_example(row["prompt"]).key)
    good = [example for example in examples["train"] if settings.format.check(example.target).exact]
    if not good:
        raise UserError("data.train: no row has a valid format, and the teacher must see some; fix them first")
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(config.endpoint, config.teacher, config.temperature, settings, good)
    row_filter = RowFilter(settings, config.teacher, known)
    have = collect(teacher, row_filter, path, len(written), config.rows, config.at_once)
    refused = ", ".join(f"{count:,} {reason}" for reason, count in row_filter.refused.most_common())
    print(f"{path}: {have:,} rows ({have - len(written):,} new)" + (f"; refused: {refused}" if refused else ""))
    if settings.columns.source is None:
        print("who wrote a row is read once the task names its column: data.columns.source: source")
    if have < config.rows:
        print(f"stopped: {PATIENCE} replies brought nothing new; raise --temperature, or show more varied rows")
    return int(have < config.rows)
