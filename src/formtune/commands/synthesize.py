"""`formtune synthesize`: rows from a teacher model, each checked against the format before it is written."""

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
from formtune.configuration.terminal import shown
from formtune.configuration.yaml_file import config_paths
from formtune.data.cleaning import Example, repair
from formtune.data.duplicates import similar
from formtune.data.preparation import read_splits
from formtune.data.settings import DataSettings
from formtune.data.sources import read_records
from formtune.errors import UserError, first_line
from formtune.files import write_lines
from formtune.formats.strict_json import loads_strict

ASKED = 8  # rows that the teacher is asked for in one request
EXAMPLES = 4  # rows that it sees
PATIENCE = 12  # replies without a new row, one after the other, that end the run
RETRIES = 5  # of a request that fails because of the server or the network


def _replies(config: Namespace, settings: DataSettings, examples: list[Example], first: int) -> Iterator[str]:
    """The teacher's replies to request `first` and all later ones."""
    try:
        import openai
    except ImportError:
        raise UserError("formtune synthesize needs the extra: pip install -e '.[synthesize]'") from None
    key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
    client = openai.OpenAI(base_url=config.endpoint, api_key=key, max_retries=RETRIES)

    def ask(number: int) -> str:
        messages: Any = [{"role": "user", "content": _request(number, settings, examples)}]
        reply = client.chat.completions.create(
            model=config.teacher, messages=messages, temperature=config.temperature, seed=number
        )
        return (reply.choices[0].message.content or "") if reply.choices else ""

    with ThreadPoolExecutor(config.at_once) as pool:
        for start in itertools.count(first, config.at_once):
            try:
                yield from pool.map(ask, range(start, start + config.at_once))
            except openai.APIError as error:
                raise UserError(f"endpoint: {config.endpoint} gave no rows: {first_line(error)}") from None


def _request(number: int, settings: DataSettings, examples: list[Example]) -> str:
    """The text of a request; its number decides the rows that the teacher sees."""
    format = json.dumps(settings.format.to_dict()["init_args"], ensure_ascii=False)
    sample = random.Random(number).sample(examples, min(EXAMPLES, len(examples)))
    rows = (json.dumps({"prompt": e.input, "completion": e.target}, ensure_ascii=False) for e in sample)
    return "\n\n".join(
        [
            "You write training data for a small language model. It gets an input and must answer in one fixed format "
            "that a program reads.",
            f"The model's instructions:\n{settings.system}" if settings.system else "",
            f"The format that every answer must keep:\n{format}",
            "Rows that exist:\n" + "\n".join(rows),
            f"Write {ASKED} new rows in the same two keys, one JSON object a line and nothing else. Vary people, "
            "places, subjects, length, tone and spelling as real inputs do; do not repeat the rows above. Put into an "
            "answer only what its input says. The completion is a string, JSON answers too.",
        ]
    )


def read_reply(reply: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a teacher's reply, one a line; fences, prose and broken lines are skipped."""
    for line in reply.splitlines():
        with contextlib.suppress(ValueError):
            record: Any = loads_strict(line.strip().rstrip(","))
            if isinstance(record, dict):
                yield record


def _new_rows(
    replies: Iterable[str], settings: DataSettings, source: dict[str, str], inputs: list[str], refused: Counter[str]
) -> Iterator[dict[str, str]]:
    """Rows with a valid format and a new input, until `PATIENCE` replies have none; `refused` counts why others are."""
    without = 0
    for reply in replies:
        without += 1
        for record in read_reply(reply):
            prompt, completion = record.get("prompt"), record.get("completion")
            if isinstance(completion, dict | list):  # a string was asked for; the content is the same
                completion = settings.format.write(completion)
            if not isinstance(prompt, str) or not isinstance(completion, str) or not prompt.strip():
                refused["not a row"] += 1
            elif not (verdict := settings.format.check(completion)).exact:
                refused[f"invalid format: {verdict.kind}"] += 1
            elif near(key := _key(prompt), inputs, settings.near_duplicates):
                refused["near-duplicate"] += 1
            else:
                without = 0
                inputs.append(key)
                yield {"prompt": prompt, "completion": completion, **source}
        if without == PATIENCE:
            return


def near(text: str, texts: list[str], threshold: float) -> bool:
    """Whether a text is nearly one of the others; it is compared with all, which is fast beside a teacher's reply."""
    others = np.arange(1, len(texts) + 1)
    return bool((similar([text, *texts], np.zeros_like(others), others) >= threshold).any())


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
    inputs = [_key(row["prompt"]) for row in rows]
    for example in itertools.chain(*examples.values()):  # a new row must not repeat one of validation or test either
        example.messages = repair(example.messages, settings.clean)
        inputs.append(example.key)
    valid = [example for example in examples["train"] if settings.format.check(example.target).exact]
    if not valid:
        raise UserError("data.train: no row has a valid format, and the teacher must see some; fix them first")
    missing, refused = max(config.rows - len(rows), 0), Counter[str]()
    source = {settings.columns.source or "source": config.teacher}
    # Numbered from the rows that are there: a continued run sends other requests.
    new = _new_rows(_replies(config, settings, valid, len(rows)), settings, source, inputs, refused)
    for row in shown(itertools.islice(new, missing), missing, f"asking {config.teacher}"):
        rows.append(row)
        write_lines(path, rows)
        missing -= 1
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())
    print(f"{path}: {len(rows):,} rows" + (f"; refused: {reasons}" if reasons else ""))
    if settings.columns.source is None:
        print("who wrote a row is read once the task names its column: data.columns.source: source")
    if missing:
        print(f"stopped: {PATIENCE} replies brought nothing new; raise --temperature, or show more varied rows")
    print(f"next: read some of the rows, add {path} to data.train, then formtune audit -c {config_paths(args)[0]}")
    return int(missing > 0)
