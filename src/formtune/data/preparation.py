"""From files to cleaned, checked, split and encoded rows: no input is in two splits, and no row is truncated."""

import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from formtune.base.row import SYSTEM_ROLES, Row, UnfitRow
from formtune.configuration.terminal import progress
from formtune.data.cleaning import Example, Quarantined, check_example, repair
from formtune.data.columns import row_schema, serialize
from formtune.data.encoded import Mixture, Splits, cache_path, content_hash, read_cache, write_cache
from formtune.data.selection import select
from formtune.data.settings import DataSettings
from formtune.data.sources import Source, entries, read_records, weighted
from formtune.errors import UserError
from formtune.files import optional
from formtune.formats import ToolCalls
from formtune.formats.content import learn_orders

# Names of the splits in file names and in columns.
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")


def load_splits(settings: DataSettings, from_cache: bool = True) -> Splits:
    """Train, validation and test rows; those from the cache come without their examples."""
    examples, ignored = read_splits(settings)
    path = cache_path(examples, settings)
    splits = read_cache(path) if path and from_cache else None
    if splits is None:
        splits = _prepare(settings, examples)
        if path:
            write_cache(path, splits)
    splits.ignored, splits.training = ignored, splits.rows["train"]
    if settings.weights:
        splits.training, splits.weights = weighted(splits.training, entries([*settings.weights]), settings.weights)
    splits.own_system = sum(
        e.messages[0]["role"] in SYSTEM_ROLES and e.messages[0]["content"] not in ("", settings.system_of(e.schema))
        for e in examples
    )
    return splits


def read_splits(settings: DataSettings) -> tuple[list[Example], Counter[str]]:
    """The conversations of all splits, test first and train last, and the number of rows by unread column."""
    if settings.sources["train"] is None:
        raise UserError("data.train: name a file to train on")
    ignored: Counter[str] = Counter()
    examples = []
    for name, source in settings.sources.items():
        if not isinstance(source, float):
            examples += read_examples(settings, source, ignored, split=name)
    if settings.split_column:
        examples.sort(key=lambda example: [*settings.sources].index(example.split))
        present = {example.split for example in examples}
        settings.fractions = {name: fraction for name, fraction in settings.fractions.items() if name not in present}
    if settings.group and not any(example.group for example in examples):
        raise UserError(f"data.group: no row has a value in the column `{settings.group}`; name another column")
    if settings.train_on == "all":
        examples = [answer for example in examples for answer in _answers(example)]
    return examples, ignored


def read_examples(
    settings: DataSettings,
    source: str | list[str] | Source,
    ignored: Counter[str],
    with_target: bool = True,
    split: str = "",
) -> list[Example]:
    """The conversations of a source, with the task's system prompt; counts rows with unread keys in `ignored`."""
    examples, columns, format = [], settings.columns, settings.format.inner or settings.format
    targets = "all" if with_target and settings.train_on == "all" else with_target
    for record, where in read_records(source):
        unread: set[str] = set()
        messages, tools = columns.conversation(record, where, targets, unread), columns.tools(record, where)
        schema = tools if isinstance(format, ToolCalls) else None
        if format.per_row and not isinstance(format, ToolCalls):
            schema = row_schema(record.get(columns.schema))
            unread.discard(columns.schema)
        if not isinstance(answer := messages[-1]["content"], str):
            try:
                row_format = format.of_row(schema)
            except UserError:  # the row will be quarantined
                messages[-1]["content"] = json.dumps(answer, ensure_ascii=False, default=str)
            else:
                messages[-1]["content"] = serialize(answer, row_format, where)
        ignored.update(sorted(unread - {settings.group, settings.split_column}))
        if (system := settings.system_of(schema)) and messages[0]["role"] not in SYSTEM_ROLES:
            # An input may already begin with the system prompt, which must not come twice.
            rest = messages[0]["content"].removeprefix(system)
            if not re.match(r"\w", rest) or system[-1:].isspace():  # "Answer" does not begin "Answers are due when?"
                messages[0]["content"] = rest
            messages.insert(0, {"role": "system", "content": system})
        group = record.get(settings.group) if settings.group else None
        row_split = split
        if settings.split_column and split == "train":
            value = record.get(settings.split_column)
            if not (row_split := SPLITS.get(str(value).lower(), "")):
                raise UserError(f"{where}: `{settings.split_column}` is {value!r}, not one of {', '.join(SPLITS)}")
        if isinstance(group, float) and group.is_integer():  # a table with missing values has no integers
            group = int(group)
        group, origin = "" if group is None else str(group), columns.origin(record, where)
        examples.append(Example(messages, where, origin, tools=tools, schema=schema, group=group, split=row_split))
    return examples


def _answers(row: Example) -> Iterator[Example]:
    """A row for each answer of a conversation except those of weight 0, with the turns before it as its context."""
    ends = [at for at, message in enumerate(row.messages, 1) if message["role"] == "assistant"]
    trained = [(n, end) for n, end in enumerate(ends, 1) if row.messages[end - 1].pop("weight", None) is None]
    if not trained:
        raise UserError(f"{row.where}: every answer has weight 0, so none would be trained; remove the row")
    if len(ends) == 1:
        return iter([row])
    # By its content, not its place, so that the split survives reordering.
    group = row.group or hashlib.blake2b(json.dumps(row.messages).encode(), digest_size=8).hexdigest()
    return (
        replace(row, messages=row.messages[:end], where=f"{row.where}, answer {n}", group=group) for n, end in trained
    )


def _prepare(settings: DataSettings, examples: Sequence[Example]) -> Splits:
    valid: list[Example] = []
    invalid: list[Quarantined] = []
    repairs: Counter[str] = Counter()
    for example in progress(examples, len(examples), "checking"):
        checked = with_rendered_answer(settings, example)
        if isinstance(checked, Example):
            checked = check_example(checked, settings.format, settings.clean, settings.repair_answers, repairs)
        if isinstance(checked, Example):
            valid.append(checked)
        else:
            invalid.append(checked)
    usual, unusual, mixed = valid, list[Quarantined](), list[Mixture]()
    if by_style := optional("quality.styles", "by_style"):
        usual, unusual, mixed = by_style(valid, settings.format, settings.repair_answers)
    chosen, splits = select(usual, settings.near_duplicates, settings.format.sets, any(settings.fractions.values()))
    splits.quarantine, splits.mixtures = [*invalid, *unusual, *splits.quarantine], mixed
    splits.read, splits.repairs = Counter(example.split for example in examples), repairs
    test, validation = settings.fractions.get("test", 0.0), settings.fractions.get("validation", 0.0)
    train = [example for example in chosen if example.split == "train"]
    sizes = Counter(example.group or example.where for example in train).values()
    splits.groups = sum(sizes) ** 2 / max(sum(size**2 for size in sizes), 1)
    for example in train:
        at = splits.cluster[example.where]
        example.split = "test" if at < test else "validation" if at < test + validation else "train"
    for name in ("train", "validation", "test"):
        members, splits.examples[name], splits.rows[name] = [e for e in chosen if e.split == name], [], []
        for example, row in _encode(settings, members):
            if not isinstance(row, Row):
                splits.quarantine.append(example.quarantined("unfit", str(row)))
            elif (size := len(row)) > (limit := settings.limit):
                detail = f"{size} tokens, the limit is {limit}"
                splits.quarantine.append(example.quarantined("too_long", detail, fix=f"data.max_length: {size}"))
            elif (size := len(row.target_ids)) > (limit := settings.max_new_tokens):
                detail = f"the answer has {size} tokens, model.max_new_tokens is {limit}"
                splits.quarantine.append(example.quarantined("too_long", detail, fix=f"model.max_new_tokens: {size}"))
            else:
                splits.examples[name].append(example)
                splits.rows[name].append(replace(row, origin=example.origin))
    splits.orders = learn_orders(example.value for example in splits.examples["train"])
    splits.key = content_hash(splits.rows)
    return splits


def with_rendered_answer(settings: DataSettings, example: Example) -> Example | Quarantined:
    """The row with its answer as the chat template writes it, if that differs from the text of its last turn."""
    if len(example.messages[-1]) == 2 and not settings.format.tags:
        return example
    messages = repair(example.messages, settings.clean)
    [row] = settings.renderer.encode([(messages, example.where, None, example.tools)])
    if not isinstance(row, Row):
        return example.quarantined("unfit", str(row))
    if settings.format.tags and "tool_calls" not in messages[-1]:
        return replace(example, messages=[*example.messages[:-1], {"role": "assistant", "content": row.target}])
    return replace(example, rendered=row.target)


def _encode(settings: DataSettings, examples: Sequence[Example]) -> Iterator[tuple[Example, Row | UnfitRow]]:
    encoded = settings.renderer.encode([(e.messages, e.where, e.schema, e.tools) for e in examples])
    return zip(examples, progress(encoded, len(examples), "encoding"), strict=True)


def encode_inputs(settings: DataSettings, source: str | list[str] | Source, key: str) -> list[Row]:
    """Encode rows without answers, such as the prompts to predict; `key` is the option that names their source."""
    settings.ignored[key] = Counter()
    examples = read_examples(settings, source, settings.ignored[key], with_target=False)
    rows = []
    for example, row in _encode(settings, [replace(e, messages=repair(e.messages, settings.clean)) for e in examples]):
        if not isinstance(row, Row):
            raise UserError(f"{example.where}: {row}; fix or remove the prompt")
        try:
            settings.format.of_row(example.schema)
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
        rows.append(row)
    if not rows:
        raise UserError(f"data.{key}: {source} has no prompts")
    return rows


@functools.lru_cache(maxsize=1)
def production_rows(settings: DataSettings) -> list[Row]:
    """Production's inputs, none if the task names no file of them."""
    return [] if settings.production is None else encode_inputs(settings, settings.production, "production")


def prompt_rows(settings: DataSettings) -> list[Row]:
    """The prompts to predict, each short enough for an answer."""
    if settings.prompts is None:
        raise UserError("data.prompts: name a file of prompts to answer")
    rows = encode_inputs(settings, settings.prompts, "prompts")
    for row in rows:
        if len(row) >= settings.limit:
            raise UserError(
                f"{row.where}: the prompt has {len(row)} tokens; with an answer it exceeds {settings.limit}; raise "
                "data.max_length (the base's context bounds it) or shorten the prompt"
            )
    return rows


def sample(rows: list[Row], count: int | None) -> list[Row]:
    """At most `count` random rows (None: all), in file order; evenly spaced ones could follow a pattern of the file."""
    most = len(rows) if count is None else min(count, len(rows))
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]
