"""Files to cleaned, judged, split and encoded rows: no input is in two splits, and no row is cut.

Knows no model and no Lightning, so that an audit answers in seconds.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from formtune.base.row import Row
from formtune.data import cache
from formtune.data.cleaning import Example, judge, quarantine, repair
from formtune.data.encoded import Splits
from formtune.data.progress import shown
from formtune.data.selection import select
from formtune.data.settings import DataSettings
from formtune.data.sources import Source, read_records
from formtune.data.styles import mixtures
from formtune.errors import UserError

# Of all conversations together, about a second of work: for less, a cache costs as much as it saves.
CACHED_CHARACTERS = 500_000


@dataclass(slots=True)
class Prepared:
    """Splits, their conversations, and the suspects: used rows with nearly the same input and unexplained answers."""

    splits: Splits
    examples: dict[str, list[Example]]
    suspects: list[tuple[Example, Example]]


def load_splits(settings: DataSettings) -> Splits:
    """Train, validation and test rows, from the cache where it has them.

    Raises:
        UserError: A file or a row cannot be read; names the file and line.
    """
    examples, ignored = read_splits(settings)
    key = cache.fingerprint(examples, settings)
    size = sum(len(m["content"]) for rows in examples.values() for example in rows for m in example.messages)
    cached = key is not None and size >= CACHED_CHARACTERS
    splits = cache.load(str(key)) if cached else None
    if splits is None:
        splits = _prepare(settings, examples, key).splits
        if cached:
            cache.store(str(key), splits)
    return _noted(splits, settings, examples, ignored)


def prepare_splits(settings: DataSettings) -> Prepared:
    """The same computed anew and stored for `load_splits` to find, with the conversations."""
    examples, ignored = read_splits(settings)
    key = cache.fingerprint(examples, settings)
    prepared = _prepare(settings, examples, key)
    if key is not None:
        cache.store(key, prepared.splits)
    _noted(prepared.splits, settings, examples, ignored)
    return prepared


def _noted(
    splits: Splits, settings: DataSettings, examples: Mapping[str, Sequence[Example]], ignored: Counter[str]
) -> Splits:
    """Add what is counted while reading; it is not in the cache, since it decides no row."""
    splits.ignored = ignored
    splits.own_system = sum(e.system not in ("", settings.system) for rows in examples.values() for e in rows)
    return splits


def read_splits(settings: DataSettings) -> tuple[dict[str, list[Example]], Counter[str]]:
    """The conversations of each split that has its own source, and how many rows have columns that are not read."""
    if settings.sources["train"] is None:
        raise UserError("data.train: name a file to train on")
    ignored: Counter[str] = Counter()
    named = {name: source for name, source in settings.sources.items() if name not in settings.shares}
    return {name: read_examples(settings, source, ignored) for name, source in named.items()}, ignored


def read_examples(
    settings: DataSettings, source: str | Source, ignored: Counter[str], with_target: bool = True
) -> list[Example]:
    """The conversations of a source, with the task's system prompt; counts in `ignored` the rows with unread keys."""
    examples = []
    for record, where in read_records(source):
        unread: set[str] = set()
        messages = settings.columns.conversation(record, where, with_target, unread)
        ignored.update(sorted(unread))
        if settings.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": settings.system})
        examples.append(Example(messages, where, settings.columns.origin(record, where)))
    return examples


def _prepare(settings: DataSettings, examples: Mapping[str, Sequence[Example]], key: str | None) -> Prepared:
    """Judge, select, keep the usual style, split and encode."""
    splits = Splits(key=key)
    judged: dict[str, list[Example]] = {}
    for name, given in examples.items():
        splits.read[name], judged[name] = len(given), []
        rows = judge(given, settings.format, settings.clean, settings.repair_answers, splits.repairs)
        for row in shown(rows, len(given), "judging"):
            if isinstance(row, Example):
                judged[name].append(row)
            else:
                splits.quarantine.append(row)
    selection = select(
        judged, settings.near_duplicates, settings.format.sets, lambda steps, n: shown(steps, n, "comparing")
    )
    splits.quarantine += selection.quarantine
    splits.shared = selection.shared
    used: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    used |= _usual_style(settings, selection.kept, splits)
    test, validation = settings.shares.get("test", 0.0), settings.shares.get("validation", 0.0)
    train, used["train"] = used["train"], []
    for example in train:
        at = selection.cluster[example.where]
        used["test" if at < test else "validation" if at < test + validation else "train"].append(example)
    encoded = {name: _encode(settings, rows, splits) for name, rows in used.items()}
    splits.rows = {name: [row for _, row in pairs] for name, pairs in encoded.items()}
    conversations = {name: [example for example, _ in pairs] for name, pairs in encoded.items()}
    splits.origins = {name: dict(Counter(e.origin for e in rows)) for name, rows in conversations.items()}
    return Prepared(splits, conversations, selection.suspects)


def _usual_style(
    settings: DataSettings, examples: dict[str, list[Example]], splits: Splits
) -> dict[str, list[Example]]:
    """The rows without those that write something in another way than most."""
    splits.mixtures = mixtures([example for rows in examples.values() for example in rows], settings.format.fields)
    details: dict[str, str] = defaultdict(str)
    for mixture in splits.mixtures:
        usual = next(iter(mixture.forms))
        for form, places in mixture.minority.items():
            detail = f"{mixture.what} of {mixture.path or 'the answer'}: {form}, most rows have {usual}"
            for where in places:
                details[where] = details[where] or detail
    for rows in examples.values():
        splits.quarantine += [quarantine(e, "style", details[e.where]) for e in rows if e.where in details]
    return {name: [e for e in rows if e.where not in details] for name, rows in examples.items()}


def _encode(settings: DataSettings, examples: list[Example], splits: Splits) -> list[tuple[Example, Row]]:
    pairs = []
    encoded = settings.renderer.encode([(e.messages, e.where) for e in examples])
    for example, row in zip(examples, shown(encoded, len(examples), "encoding"), strict=True):
        reason, detail = "too_long", ""
        if not isinstance(row, Row):
            reason, detail = "unfit", str(row)
        elif len(row) > settings.limit:
            detail = f"{len(row)} tokens, the limit is {settings.limit}"
        elif (size := len(row.target_ids)) > settings.max_new_tokens:
            detail = f"the answer has {size} tokens, model.max_new_tokens is {settings.max_new_tokens}"
        if detail or not isinstance(row, Row):
            splits.quarantine.append(quarantine(example, reason, detail))
        else:
            pairs.append((example, replace(row, origin=example.origin)))
    return pairs


def encode_inputs(settings: DataSettings, source: str | Source, key: str) -> list[Row]:
    """Rows without answers, such as the prompts to predict.

    Args:
        settings: How they are read.
        source: Where they come from.
        key: Name of the option that names them, for messages.

    Raises:
        UserError: There is none, or one cannot be rendered; names the file and line.
    """
    settings.ignored[key] = Counter()
    examples = read_examples(settings, source, settings.ignored[key], with_target=False)
    encoded = settings.renderer.encode([(repair(e.messages, settings.clean), e.where) for e in examples])
    rows = []
    for example, row in zip(examples, shown(encoded, len(examples), "encoding"), strict=True):
        if not isinstance(row, Row):
            raise UserError(f"{example.where}: {row}; fix or remove the prompt")
        rows.append(row)
    if not rows:
        raise UserError(f"data.{key}: {source} holds no prompt")
    return rows


@functools.lru_cache(maxsize=1)
def production_rows(settings: DataSettings) -> list[Row]:
    """Production's inputs, none where the task names no file of them; raises as `encode_inputs`."""
    return [] if settings.production is None else encode_inputs(settings, settings.production, "production")


def prompt_rows(settings: DataSettings) -> list[Row]:
    """The prompts to predict, each short enough for an answer; raises as `encode_inputs`, or if one is too long."""
    if settings.prompts is None:
        raise UserError("data.prompts: name a file of prompts to answer")
    rows = encode_inputs(settings, settings.prompts, "prompts")
    for row in rows:
        if len(row) >= settings.limit:
            raise UserError(
                f"{row.where}: the prompt has {len(row)} tokens, with an answer more than the limit of "
                f"{settings.limit}; raise data.max_length (the base's context bounds it) or shorten the prompt"
            )
    return rows
