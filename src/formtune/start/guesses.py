"""Guesses for a task's YAML from its rows: columns, instruction, format, schema and group, each with its reason."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from formtune.base.row import Message
from formtune.data.cleaning import Example
from formtune.data.columns import Columns
from formtune.data.preparation import SPLITS
from formtune.data.turns import empty
from formtune.errors import UserError
from formtune.formats.bounded import FORMATS
from formtune.formats.format import unfenced
from formtune.formats.strict_json import loads_strict

MIN_VALUES = 10  # to infer a rule about them
MAX_NEW_SHARE = 0.01  # chance that the next value is new: about the fraction of values seen once (Good-Turing)
MAX_CHOICES, MIN_REPEATS = 200, 10  # values of an enum, and occurrences of each on average
MIN_COPIED = 0.8  # fraction of values found in their inputs from which a field is copied text, not an enum
NAMES = ("date", "date-time", "time", "uuid", "ipv4", "email")
TYPES = {str: "string", int: "integer", float: "number", dict: "object", list: "array", bool: "boolean"}

Values = Sequence[tuple[Any, str]]  # each with the input of its document
Records = Sequence[tuple[dict[str, Any], str]]

MIN_FIT = 0.9  # fraction of the answers that a format must accept
MAX_LABEL = 80  # characters of a label
MIN_WORDS = 5  # of a shared instruction
PROMPTS = ("prompt", "subject", "title", "instruction", "question", "query", "input", "text", "utterance", "sentence",
           "message", "request", "body", "content", "email", "review", "document", "description", "tweet",
           "context", "passage", "premise", "hypothesis", "sentence1", "sentence2")  # fmt: skip
TARGETS = ("completion", "output", "answer", "response", "target", "label", "label_text", "labels", "intent",
           "category", "class", "json", "result", "expected", "gold", "sentiment", "rating", "score", "topic", "tag",
           "entities")  # fmt: skip
GROUP = (
    r"(?i)(group|conversation|dialog(ue)?|session|thread|user|customer|client|author|doc(ument)?|patient|case)(_?id)?"
)
SPLIT = r"(?i)(data_?)?(split|subset|fold|partition|set)"
NUMBER = r"(?i)((row_?)?(id|index)|uuid|unnamed: 0)?"  # row numbers; pandas writes its index without a name


def infer(values: Values) -> dict[str, Any]:
    """Infer the schema of the values at one place of the documents."""
    kinds = {TYPES.get(type(value), "null") for value, _ in values}
    types = sorted(kinds - ({"integer"} if "number" in kinds else set()))
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if {*types} <= {"string", "null"}:
        texts = [(value, input) for value, input in values if value is not None]
        counts = Counter(text for text, _ in texts)
        if is_categorical(counts) and sum(_copied(text, input) for text, input in texts) < MIN_COPIED * len(texts):
            return {"enum": [*sorted(counts), *([None] if "null" in types else [])]}
        schema |= string_constraint([*counts])
    if items := [(inner, input) for value, input in values if isinstance(value, list) for inner in value]:
        schema["items"] = infer(items)
    if objects := [(value, input) for value, input in values if isinstance(value, dict)]:
        schema |= _object(objects)
    return schema


def _copied(text: str, input: str) -> bool:
    # From the beginning of a word: "on" is not in "London". Other scripts may have no spaces.
    start = r"(?<!\w)" if text.isascii() else ""
    return re.search(start + re.escape(text), input, re.IGNORECASE) is not None


def _object(values: Values) -> dict[str, Any]:
    keys: dict[str, list[tuple[Any, str]]] = defaultdict(list)
    for value, input in values:
        for key, inner in value.items():
            keys[key].append((inner, input))
    required = [key for key, inner in keys.items() if len(inner) == len(values)]
    is_open = likely_unseen_values([*map(len, keys.values())], len(values))
    known = [key for key, inner in keys.items() if len(inner) >= MIN_VALUES or key in required or not is_open]
    schema = {"properties": {key: infer(keys[key]) for key in known}, "required": required}
    return schema if is_open else schema | {"additionalProperties": False}


def likely_unseen_values(counts: list[int], total: int) -> bool:
    """Whether new values are likely, by how many of the counted ones occur once."""
    return counts.count(1) > MAX_NEW_SHARE * total + 1


def is_categorical(values: Counter[Any]) -> bool:
    """Whether the values repeat so often that no new one is likely."""
    total, count = values.total(), len(values)
    repeats = 0 < count <= MAX_CHOICES and total >= MIN_REPEATS * count
    return repeats and not likely_unseen_values([*values.values()], total)


def string_constraint(texts: list[str]) -> dict[str, str]:
    """The format or the pattern that all texts match."""
    if len(texts) < MIN_VALUES:
        return {}
    for name in NAMES:
        if all(FORMATS.conforms(text, name) for text in texts):
            return {"format": name}
    if pattern := common_pattern(texts):  # before `uri`, which GO:0001 is too
        return {"pattern": f"^{pattern}$"}
    return {"format": "uri"} if all(FORMATS.conforms(text, "uri") for text in texts) else {}


def common_pattern(texts: list[str]) -> str:
    """The pattern that all texts match if they contain numbers, such as `[A-Z]{2}-[0-9]+`; "" if there is none."""
    classes = {"0": "[0-9]+", "A": "[A-Z]", "a": "[a-z]"}
    shapes = {re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub("[0-9]+", "0", text))) for text in texts}
    if len(texts) < MIN_VALUES or len(shapes) > 1 or "0" not in (shape := shapes.pop()):
        return ""
    pattern = ""
    for run in re.finditer(r"(?s)(.)\1*", shape):
        part = classes.get(run[1]) or re.sub(r"[\\^$.|?*+()\[\]{}/]", r"\\\g<0>", run[1])
        pattern += part + (f"{{{len(run[0])}}}" if len(run[0]) > 1 else "")
    return pattern


class Guess(NamedTuple):
    """A key of the YAML, its value, and why it has that value."""

    key: str
    value: Any
    why: str


def guess_columns(records: Records, prompt: str | None, completion: str | None) -> dict[str, str]:
    """`data.columns`; empty if the layout of the rows is recognized without it."""
    where = records[0][1]
    # The first value of each column: it may be null in the first rows.
    record = {key: value for row, _ in reversed(records[:100]) for key, value in row.items() if value is not None}
    if not (prompt or completion):
        try:
            Columns().conversation(*records[0], True)
            return {}
        except UserError:
            if {"messages", "conversations"} & record.keys():  # the turns are wrong, not the columns
                raise
    names = [name for name in record if not (re.fullmatch(SPLIT, name) or re.fullmatch(NUMBER, name))]
    targets = [completion] if completion else [name for name in names if name.lower() in TARGETS and name != prompt]
    targets = [name for name in targets if f"{name}_text" not in targets]  # `label` is the number of `label_text`
    targets = targets or [name for name in names if isinstance(_document(record[name]), dict | list)]
    texts = [name for name in names if name not in targets and isinstance(record[name], str)]
    known = [prompt] if prompt else [name for name in texts if name.lower() in PROMPTS]
    prompts = known or texts
    if not targets and len(prompts) == 1:  # the only other column
        targets = [name for name in names if name not in prompts]
    if len(targets) != 1 or not prompts or len(prompts) > max(len(known), 1):
        raise UserError(
            f"{where}: which of the columns {', '.join(record)} is the prompt, and which the target? Name them: "
            "--prompt COLUMN --completion COLUMN (the prompt may be a template such as 'Title: {title}')"
        )
    template = prompts[0] if len(prompts) == 1 else "\n\n".join(f"{{{name}}}" for name in prompts)
    return {"prompt": template, "completion": targets[0]}


def read_rows(records: Records, columns: Columns) -> list[Example]:
    """The conversations; an answer that is not a string stays as it is."""
    return [
        Example(columns.conversation(record, where, True), where, tools=columns.tools(record, where),
                schema=record.get(columns.schema))
        for record, where in records
    ]  # fmt: skip


def guess_system(rows: Sequence[Example]) -> str:
    """What all single-turn prompts begin with, up to the end of a line or sentence; "" if nothing."""
    texts = [row.input for row in rows]
    shared = re.match(r"(?s)(.*(\n|[.:!?] ))?", os.path.commonprefix(texts))[0]  # type: ignore[index]  # noqa: RUF071
    longer = all(len(row.messages) == 2 and not row.tools and len(row.input.strip()) > len(shared) for row in rows)
    return shared if longer and len(shared.split()) >= MIN_WORDS and len(rows) >= MIN_VALUES else ""


def guess_splits(records: Records) -> list[Guess]:
    """Columns whose names and values say which rows belong together, and in which split each row is."""
    guesses: dict[str, Guess] = {}
    for name in reversed(records[0][0]):  # the first one counts
        values = Counter(str(record[name]) for record, _ in records if not empty(record.get(name)))
        if re.fullmatch(GROUP, name) and MIN_VALUES <= len(values) < values.total():
            why = f"{len(values):,} values over {values.total():,} rows: never in two splits"
            guesses["group"] = Guess("data.group", name, why)
        elif re.fullmatch(SPLIT, name) and {"train"} < {*map(str.lower, values)} <= SPLITS.keys():
            why = ", ".join(f"{count:,} rows of {value}" for value, count in values.items())
            guesses["split"] = Guess("data.split_column", name, why)
    return [*guesses.values()]


def guess_tags(rows: list[Example]) -> tuple[dict[str, Any], list[Example]]:
    """The tags around the reasoning before nearly all answers ({} if there is none), and the rows without it."""
    parts = [_reasoning(row.messages[-1]) for row in rows]
    tag, count = Counter(tag for tag, _ in parts).most_common(1)[0]
    if not tag or count < MIN_FIT * len(rows):
        return {}, rows
    bare = [replace(row, messages=[*row.messages[:-1], last]) for row, (_, last) in zip(rows, parts, strict=True)]
    return {"open": f"<{tag}>", "close": f"</{tag}>"}, bare


def _reasoning(answer: Message) -> tuple[str, Message]:
    """The tag around the reasoning before an untagged answer, "" if there is none; and the answer without it."""
    if "reasoning_content" in answer:
        return "think", {key: value for key, value in answer.items() if key != "reasoning_content"}
    match = re.match(r"(?s)\s*<(\w+)>.*?</\1>\s*(?=[^\s<])", str(answer["content"]))
    return (match[1], answer | {"content": answer["content"][match.end() :]}) if match else ("", answer)


def guess_format(rows: Sequence[Example], template: str) -> tuple[str, dict[str, Any], str]:
    """Class and arguments of the strictest format of nearly all answers, and why; `template` is a chat template."""
    answers, total, first = [row.messages[-1]["content"] for row in rows], len(rows), rows[0].where
    if called := [row for row in rows if "tool_calls" in row.messages[-1]]:
        text_rows = [row for row in rows if row.tools and "tool_calls" not in row.messages[-1]]
        syntax = "mistral" if "[TOOL_CALLS]" in template else "llama" if '"parameters": ' in template else "hermes"
        why = f"{len(called):,} answers call tools ({called[0].where}), and {len(text_rows):,} with tools are text"
        return "ToolCalls", {"syntax": syntax, "tool_choice": "auto" if text_rows else "required"}, why
    if sum(isinstance(_document(row.schema), dict) for row in rows) >= MIN_FIT * total:
        return "JsonSchema", {}, f"each row has its own schema ({first})"
    documents = [(value, row) for row, it in zip(rows, answers, strict=True) if (value := _document(it)) is not None]
    objects = [(value, row) for value, row in documents if isinstance(value, dict | list)]
    if len(objects) >= MIN_FIT * total:
        return _schema(objects, total)
    texts = Counter(map(str, answers))
    sections = Counter(tuple(re.findall(r"<([A-Za-z_][\w-]*)>.*?</\1>", text, re.S)) for text in texts.elements())
    usual, count = sections.most_common(1)[0]
    if 0 < len(set(usual)) == len(usual) and count >= MIN_FIT * total:
        return "Tagged", {"sections": [*usual]}, f"{count:,} of {total:,} answers have these sections ({first})"
    labels = Counter(label for text in texts.elements() if 0 < len(label := text.strip()) <= MAX_LABEL)
    if labels.total() >= MIN_FIT * total and is_categorical(labels) and not isinstance(answers[0], bool | float):
        label, count = labels.most_common()[-1]
        why = f"{len(labels)} answers repeat over {total:,} rows, the rarest is {label!r}: {count:,} times"
        return "Labels", {"labels": sorted(labels)}, why
    if len(documents) >= MIN_FIT * total:
        return _schema(documents, total)
    if pattern := common_pattern([*texts]):
        return "Regex", {"pattern": pattern}, f"a suggestion, check it: answers look like {answers[0]!r:.40} ({first})"
    raise UserError(
        f"{first}: no format fits {MIN_FIT:.0%} of the answers, such as {answers[0]!r:.40}; formtune needs answers "
        "that code can check: JSON, labels, tagged sections, tool calls, a pattern, or a custom class"
    )


def _document(answer: Any) -> Any:
    """A string parsed as JSON, also within a code fence, None if it is not JSON; other answers unchanged."""
    try:
        return loads_strict(unfenced(answer).strip())
    except ValueError:
        return None
    except AttributeError:
        return answer


def _schema(documents: Sequence[tuple[Any, Example]], total: int) -> tuple[str, dict[str, Any], str]:
    # Without the instruction that all inputs begin with: it may list the labels, which are then not copied.
    skip = os.path.commonprefix([row.input for _, row in documents]).rfind(" ") + 1  # noqa: RUF071
    schema = infer([(value, row.input[skip:]) for value, row in documents])
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    why = f"{len(documents):,} of {total:,} answers match it ({documents[0][1].where})"
    return "JsonSchema", {"schema": schema}, why
