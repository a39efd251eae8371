"""What a task's YAML should say of a set of rows: columns, instruction, format and group, each with its reason."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from formtune.data.cleaning import Example
from formtune.data.shapes import Columns
from formtune.data.turns import empty
from formtune.errors import UserError
from formtune.formats.content import Words
from formtune.formats.strict_json import loads_strict
from formtune.start.documents import FEW, Observed, common_pattern, is_closed, without_mistakes

FIT = 0.9  # share of the answers that a format must take
LABELS, LONGEST = 200, 80  # labels, and characters of a label, at most
WORDS, SHARED = 5, 0.99  # of a shared instruction at least, and the share of the prompts that begin with it
LARGEST = 0.2  # share of the rows that one group may have
PROMPTS = ("prompt", "subject", "title", "instruction", "question", "query", "input", "text", "utterance", "sentence",
           "message", "request", "body", "content", "email", "review", "document", "description", "tweet")  # fmt: skip
TARGETS = ("completion", "output", "answer", "response", "target", "label", "labels", "intent", "category", "class",
           "json", "result", "expected", "gold", "sentiment", "rating", "topic", "tag", "entities")  # fmt: skip
GROUP = (
    r"(?i)(group|conversation|dialog(ue)?|session|thread|user|customer|client|author|doc(ument)?|patient|case)(_?id)?"
)

Records = Sequence[tuple[dict[str, Any], str]]


class Guess(NamedTuple):
    """A key of the YAML, its value, and why it has that value."""

    key: str
    value: Any
    why: str


def guess_columns(records: Records, prompt: str | None, completion: str | None) -> dict[str, str]:
    """`data.columns`; empty for rows of a shape that is recognized without it."""
    record, where = records[0]
    if not (prompt or completion):
        try:
            Columns().conversation(record, where, True)
            return {}
        except UserError:
            if {"messages", "conversations"} & record.keys():  # the turns are wrong, not the columns
                raise
    targets = [completion] if completion else [name for name in record if name.lower() in TARGETS and name != prompt]
    targets = targets or [name for name, value in record.items() if isinstance(_document(value), dict | list)]
    texts = [name for name in record if name not in targets and isinstance(record[name], str)]
    prompts = [prompt] if prompt else [name for name in texts if name.lower() in PROMPTS]
    prompts, are_known = prompts or texts, bool(prompts)
    if not targets and len(prompts) == 2:  # the column whose values repeat is the answer
        prompts.sort(key=lambda name: -len({str(row.get(name)) for row, _ in records}))
        targets = [prompts.pop()]
    if len(targets) != 1 or not prompts or (len(prompts) > 1 and not are_known):
        raise UserError(
            f"{where}: which of the columns {', '.join(record)} is the prompt, and which the target? Name them: "
            "--prompt COLUMN --completion COLUMN (the prompt may be a template such as 'Title: {title}')"
        )
    template = prompts[0] if len(prompts) == 1 else "\n\n".join(f"{{{name}}}" for name in prompts)
    return {"prompt": template, "completion": targets[0]}


def read_rows(records: Records, columns: Columns) -> list[Example]:
    """The conversations; an answer that is no text stays as it is."""
    return [
        Example(columns.conversation(record, where, True), where, tools=columns.tools(record, where),
                schema=record.get(columns.schema))
        for record, where in records
    ]  # fmt: skip


def guess_instruction(rows: Sequence[Example]) -> str:
    """What nearly all prompts of one turn begin with, up to the end of a line or sentence; "" for nothing."""
    prompts = sorted(row.input for row in rows)
    edge = int((1 - SHARED) / 2 * len(prompts))
    ends = zip(prompts[edge], prompts[-1 - edge], strict=False)
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    shared = shared[: max((match.end() for match in re.finditer(r"\n+|[.:!?] +", shared)), default=0)]
    alone = all(len(row.messages) == 2 and not row.tools and row.input.removeprefix(shared).strip() for row in rows)
    return shared if alone and len(shared.split()) >= WORDS and len(rows) >= FEW else ""


def guess_group(records: Records) -> Guess | None:
    """A column whose name and repeated values say that rows belong together."""
    for name in records[0][0]:
        values = [str(record[name]) for record, _ in records if not empty(record.get(name))]
        counts = Counter(values if re.fullmatch(GROUP, name) else ())
        if FEW <= len(counts) < len(values) and max(counts.values()) <= LARGEST * len(values):
            return Guess("data.group", name, f"{len(counts):,} values over {len(values):,} rows: never in two splits")
    return None


def guess_format(rows: Sequence[Example], template: str) -> tuple[str, dict[str, Any], str]:
    """Class and arguments of the strictest format that nearly all answers have, and why.

    `template` is the base's chat template, "" if it is unknown.
    """
    answers = [row.messages[-1]["content"] for row in rows]
    texts, total, first = Counter(map(str, answers)), len(rows), rows[0].where
    if called := [row for row in rows if "tool_calls" in row.messages[-1]]:
        spoken = [row for row in rows if row.tools and "tool_calls" not in row.messages[-1]]
        syntax = "mistral" if "[TOOL_CALLS]" in template else "llama" if '"parameters": ' in template else "hermes"
        why = f"{len(called):,} answers call tools ({called[0].where}), written by the base's chat template as {syntax}"
        why += f"; {len(spoken):,} answer with text beside tools ({spoken[0].where})" if spoken else ""
        return "ToolCalls", {"syntax": syntax, "tool_choice": "auto" if spoken else "required"}, why
    if sum(not empty(row.schema) for row in rows) >= FIT * total:
        return "JsonSchema", {}, f"each row has its own schema ({first})"
    documents = [(value, row) for row, it in zip(rows, answers, strict=True) if (value := _document(it)) is not None]
    objects = [(value, row) for value, row in documents if isinstance(value, dict | list)]
    if len(objects) >= FIT * total:
        return _schema(objects, total)
    sections = Counter(tuple(re.findall(r"<([A-Za-z_][\w-]*)>.*?</\1>", text, re.S)) for text in texts.elements())
    usual, count = sections.most_common(1)[0]
    if 0 < len(set(usual)) == len(usual) and count >= FIT * total:
        return "Tagged", {"sections": [*usual]}, f"{count:,} of {total:,} answers have these sections ({first})"
    labels = Counter({text: n for text, n in texts.items() if len(text) <= LONGEST and text == text.strip()})
    if labels.total() >= FIT * total and is_closed(labels, LABELS):
        kept = sorted(without_mistakes(labels))
        rarest = min(kept, key=labels.__getitem__)
        why = f"{len(kept)} answers repeat over {total:,} rows, {rarest!r} {labels[rarest]:,} times"
        return "Labels", {"labels": kept}, why
    if len(documents) >= FIT * total:
        return _schema(documents, total)
    lines = Counter(tuple(re.findall(r"(?m)^([A-Za-z][\w -]*):", text)) for text in texts.elements())
    names = lines.most_common(1)[0][0]
    pattern = common_pattern(texts)
    if not pattern and 0 < len(set(names)) == len(names):
        pattern = r"\n".join(rf"{name}: ?(?P<{re.sub('[ -]', '_', name).lower()}>[^\n]*)" for name in names)
    if pattern and sum(n for text, n in texts.items() if re.fullmatch(pattern, text)) >= FIT * total:
        return "Regex", {"pattern": pattern}, f"a suggestion, check it: answers look like {answers[0]!r:.40} ({first})"
    raise UserError(
        f"{first}: no format fits {FIT:.0%} of the answers, such as {answers[0]!r:.40}; formtune trains answers that "
        "code can check: JSON, labels, tagged sections, tool calls, lines of `key: value`, or a class of yours"
    )


def _document(answer: Any) -> Any:
    """The JSON document that an answer is, also within a code fence; None if it is none."""
    try:
        return loads_strict(re.sub(r"```\w*\n(.*?)\n?```", r"\1", answer.strip(), flags=re.S))
    except ValueError:
        return None
    except AttributeError:
        return answer


def _schema(documents: Sequence[tuple[Any, Example]], total: int) -> tuple[str, dict[str, Any], str]:
    observed = Observed()
    for value, row in documents:
        observed.add(value, Words(row.input))
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **observed.schema()}
    allowed = schema.get("properties", observed.keys)
    rare = [f"{key} in {it.types.total()}" for key, it in observed.keys.items() if key not in allowed]
    why = f"{len(documents):,} of {total:,} answers are such JSON ({documents[0][1].where})"
    why += f"; too rare to be allowed: {', '.join(rare)}" if rare else ""
    derived = sorted({*observed.derived(schema)})
    return "JsonSchema", {"schema": schema} | ({"derived": derived} if derived else {}), why
