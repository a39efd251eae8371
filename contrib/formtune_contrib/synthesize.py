"""`formtune synthesize`: write a teacher model's answers to prompts if their format is valid."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from formtune.commands import COMMANDS
from formtune.configuration.terminal import progress
from formtune.data.cleaning import Example, repair, repair_answer
from formtune.data.preparation import read_examples, read_splits, with_rendered_answer
from formtune.data.selection import input_keys
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.files import optional
from formtune.tasks.parsers import read_task, task_parser
from formtune_contrib import task_file
from formtune_contrib.endpoint import Client, Refused

BAD_PROMPT = (400, 413, 422)  # HTTP statuses for one prompt, such as a too long one; others apply to all
SHOTS = 4  # training rows in the teacher's prompt
REPAIRS = ("edges", "fence", "canonical")  # of an answer, applied only if its format is then valid


def run(command: str, args: list[str]) -> None:
    """Ask the new prompts, and write the answers with a valid format."""
    parser = task_parser(command, COMMANDS[command].description)
    url = "Such as http://localhost:8000/v1; the API key is in OPENAI_API_KEY"
    parser.add_argument("--endpoint", type=str, required=True, help=url)
    parser.add_argument("--teacher", type=str, required=True, help="Name of the model, for the rows' source column")
    parser.add_argument("--out", type=str, required=True, help="File of JSON Lines to write or to continue")
    parser.add_argument("--concurrency", type=PositiveInt, default=4, help="Concurrent requests")
    config, settings = read_task(parser, args)
    format, columns, path = settings.format, settings.columns, Path(config.out)
    if path.suffix != ".jsonl":
        raise UserError(f"--out: {path} must be a .jsonl file, one row per line")
    if format.per_row:
        raise UserError("data.format: a teacher needs one schema for all rows; set data.format.init_args.schema")
    if settings.prompts is None:
        raise UserError("data.prompts: name a file of inputs for the teacher to answer")
    known, _ = read_splits(settings)
    written = (with_rendered_answer(settings, example) for example in known if example.split == "train")
    shots = [*islice((e for e in written if isinstance(e, Example) and format.check(e.target).exact), SHOTS)]
    known += read_examples(settings, config.out, Counter()) if path.is_file() else []
    prompts = read_examples(settings, settings.prompts, Counter(), with_target=False)
    if any(example.tools for example in prompts):
        raise UserError("data.prompts: tools are not sent to a teacher; remove prompts with tools")
    prompts = [replace(one, messages=[*one.messages, {"role": "assistant", "content": ""}]) for one in prompts]
    # A new row must not repeat a validation or test row either.
    keys = input_keys([replace(one, messages=repair(one.messages, settings.clean)) for one in (*known, *prompts)])
    near = optional("quality.duplicates", "near_duplicates", "synthesize")
    repeats = {second for _, second in near(keys, range(len(keys)), settings.near_duplicates)[1]}
    new = [example for i, example in enumerate(prompts, len(known)) if i not in repeats]

    client = Client(config.endpoint, config.teacher)
    rule = json.dumps(format.to_dict()["init_args"], ensure_ascii=False)
    before = [turn for shot in shots for turn in shot.messages if turn["role"] != "system"]

    def ask(prompt: list[Any]) -> str | Refused:
        systems = [turn["content"] for turn in prompt if turn["role"] == "system"]
        system = "\n\n".join([*systems, f"Give only the answer, exactly in this format: {rule}"])
        turns = [*before, *(turn for turn in prompt if turn["role"] != "system")]
        try:
            reply = client.complete(messages=[{"role": "system", "content": system}, *turns])
        except Refused as error:
            if error.status not in BAD_PROMPT:
                raise
            return error
        return reply.choices[0].message.content or ""

    count = sum(1 for _ in read_records(config.out)) if path.is_file() else 0
    added = {"role": "system", "content": settings.system}  # by the task, to each row
    refused, pool = Counter[str](), ThreadPoolExecutor(config.concurrency)
    try:
        asked = pool.map(ask, (example.messages[:-1] for example in new))
        answers = progress(asked, len(new), f"asking {config.teacher}")
        for example, answer in zip(new, answers, strict=True):
            if isinstance(answer, Refused):
                refused["the server refused the prompt"] += 1
                if refused.total() == len(new):  # it refuses all
                    raise answer
                continue
            answer = repair_answer(answer, format, REPAIRS, Counter())
            if (verdict := format.check(answer)).exact:
                turns = [turn for turn in example.messages[:-1] if turn != added]
                turns.append({"role": "assistant", "content": answer})
                row = {columns.messages: turns, columns.source or "source": config.teacher}
                _append(path, row)
                count += 1
            else:
                refused[f"invalid format, {verdict.kind}"] += 1
    finally:
        pool.shutdown(cancel_futures=True)
    reasons = "".join(f"; {count:,} left out: {kind}" for kind, count in refused.most_common())
    print(f"{path}: {count:,} rows; not asked: {len(prompts) - len(new):,} near-duplicates{reasons}")
    if columns.source is None:
        print("to count rows by author, set data.columns.source: source in the task")
    print(f"next: read some of the rows, add {path} to data.train, then formtune audit -c {task_file(args)}")


def _append(path: Path, row: Any) -> None:
    """Append plain data to a file of JSON Lines, and make the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        line = "" if file.read() in (b"", b"\n") else "\n"  # the last line may lack its end
        file.write(f"{line}{json.dumps(row, ensure_ascii=False)}\n".encode(errors="backslashreplace"))
