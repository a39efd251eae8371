"""The encoded rows of a run, the quarantined ones, and their cache in `.cache/encoded`."""

import hashlib
import json
import platform
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from formtune.base.row import Row, interned
from formtune.data.cleaning import Example, Quarantined
from formtune.data.settings import DataSettings
from formtune.files import own_code, read_entry, write_entry
from formtune.formats.content import Orders

FEW_ROWS = 500  # with fewer, a model mostly memorizes the examples
CACHE = Path(".cache/encoded")  # in the working directory, like `logs`
MAX_ENTRIES = 8  # of the cache; the least recently used are removed
CACHED = ("rows", "read", "repairs", "quarantine", "mixtures", "groups", "shared", "orders", "key")
PACKAGES = ("tokenizers", "transformers", "jinja2", "regex", "jsonschema", "referencing", "ftfy")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A field, or the layout, that answers write in several styles."""

    path: str  # dotted path of the field, "" for the whole answer
    what: str  # layout, key order, empty, date or number
    forms: dict[str, int]  # number of rows by style, the most frequent first
    minority: dict[str, list[str]]  # for each other style, the places of the rows that use it


@dataclass(slots=True)
class Splits:
    """The encoded rows of each split, and the quarantined ones."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    quarantine: list[Quarantined] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    groups: float = 0.0  # effective number of groups (Kish: (sum n)**2 / sum n**2); 0 if unknown
    shared: float = 0.0  # fraction of the inputs' text that many inputs share; 0 without the folder `quality`
    orders: Orders = field(default_factory=dict)  # key orders of training targets
    key: str = ""  # content hash of the rows
    ignored: Counter[str] = field(default_factory=Counter)  # number of rows by key that is not read
    own_system: int = 0  # rows with their own system prompt
    training: list[Row] = field(default_factory=list)  # the rows of train, each as often as in an epoch
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # by entry of `data.train`, with counts
    cached: Path | None = field(default=None, compare=False)  # the file they were read from
    # Empty if the rows were read from the cache:
    examples: dict[str, list[Example]] = field(default_factory=dict, compare=False)  # the conversation of each row
    cluster: dict[str, float] = field(default_factory=dict, compare=False)  # a row's cluster in [0, 1), by its place

    @property
    def reasons(self) -> Counter[str]:
        """The number of quarantined rows by reason."""
        return Counter(row.reason for row in self.quarantine)

    @property
    def quarantined(self) -> str:
        """The reasons in words, the most frequent first; empty if no row is quarantined."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())


def content_hash(rows: Mapping[str, Sequence[Row]]) -> str:
    """A hash of the token ids of each split's rows, independent of their files."""
    hashed = hashlib.blake2b(digest_size=16)
    for split, members in rows.items():
        for row in members:
            hashed.update(array("i", [*row.prompt_ids, -1, *row.target_ids, -2]))
            hashed.update((row.schema or "").encode("utf-8", "surrogatepass"))
        hashed.update(split.encode())
    return hashed.hexdigest()


def cache_path(examples: Sequence[Example], settings: DataSettings) -> Path | None:
    """The cache file of these rows, named by all inputs; None for a custom format, whose code may change."""
    format, tokenizer = settings.format, settings.renderer.tokenizer
    if format.is_custom:
        return None
    inputs = [
        [settings.fractions, settings.clean, settings.repair_answers, settings.near_duplicates],
        [settings.limit, settings.max_new_tokens, settings.date, format.to_dict()],
        [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template],
        [{name: str(token) for name, token in tokenizer.special_tokens_map.items()}, tokenizer.split_special_tokens],
        [*map(version, PACKAGES), platform.python_version(), find_spec("rensa") and version("rensa")],
    ]
    hashed = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16)
    for path in own_code("base", "data", "formats", "quality"):
        hashed.update(path.read_bytes())
    for e in examples:
        row = [e.split, e.where, e.messages, e.origin, e.schema, e.tools, e.group]
        hashed.update(json.dumps(row).encode())
    return CACHE / f"{hashed.hexdigest()}.json"


def read_cache(path: Path) -> Splits | None:
    """The splits in this file, None if there is none or it is damaged."""
    if (stored := read_entry(path)) is None:
        return None
    stored["rows"] = {
        name: [Row(interned(p), interned(t), *rest) for p, t, *rest in rows] for name, rows in stored["rows"].items()
    }
    records = {"quarantine": Quarantined, "mixtures": Mixture}
    stored |= {name: [record(*values) for values in stored[name]] for name, record in records.items()}
    stored |= {name: Counter(stored[name]) for name in ("read", "repairs")}
    return Splits(**stored, cached=path)


def write_cache(path: Path, splits: Splits) -> None:
    write_entry(path, {name: getattr(splits, name) for name in CACHED}, MAX_ENTRIES)
