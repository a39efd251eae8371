"""Files to cleaned and encoded splits, so that no input stands on both sides of a split and no row is cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.data import cache
from formtune.data.cleaning import Example, judge, set_aside
from formtune.data.encoded import Splits
from formtune.data.fingerprint import fingerprint
from formtune.data.progress import shown
from formtune.data.selection import select
from formtune.data.sources import Columns, Source, open_source
from formtune.data.styles import mixtures
from formtune.formats import Format

# Of all conversations together, about a second of work: for less, a cache costs as much as it saves.
CACHED_CHARACTERS = 500_000

SPLITS = ("train", "validation", "test")
Given = str | Source


@dataclass(slots=True)
class Prepared:
    """Splits with the conversations that were encoded to them.

    Args:
        splits: The rows.
        examples: The same rows as conversations.
        suspects: Pairs of used rows with nearly the same input and different answers that nothing explains.
    """

    splits: Splits
    examples: dict[str, list[Example]]
    suspects: list[tuple[Example, Example]]


class Splitter:
    """Reads, cleans, splits and encodes.

    Args:
        contract: Judges every answer.
        renderer: Turns conversations into ids.
        columns: How records become conversations.
        system: System prompt put before conversations that have none.
        steps: Names of the cleaning steps for inputs.
        answer_steps: Names of the repairs for answers.
        near: Jaccard index from which on two inputs are nearly the same.
        max_length: Tokens of prompt and answer that a row may have; longer rows are set aside, never cut.
        max_new_tokens: Tokens of the longest answer that evaluation will decode.
    """

    def __init__(
        self,
        contract: Format,
        renderer: Renderer,
        columns: Columns,
        system: str | None,
        steps: Sequence[str],
        answer_steps: Sequence[str],
        near: float,
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        self.contract, self.renderer, self.columns = contract, renderer, columns
        self.system, self.steps, self.answer_steps, self.near = system, steps, answer_steps, near
        self.max_length, self.max_new_tokens = max_length, max_new_tokens

    def examples(self, source: Given, gold: bool, ignored: Counter[str]) -> list[Example]:
        """The conversations of a source, the system prompt in front, and how many rows have keys that are not read."""
        source = open_source(source) if isinstance(source, str) else source
        found: list[Example] = []
        for record, where in source.records():
            unread: set[str] = set()
            messages = self.columns.conversation(record, where, gold, unread)
            ignored.update(sorted(unread))
            if self.system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system})
            found.append(Example(messages, where, self.columns.origin(record, where)))
        return found

    def split(self, train: Given, validation: Given | float, test: Given | float) -> Splits:
        """Rows of train, validation and test; a number is the share of train's inputs to split off by hash.

        What was worked out before for the same rows, contract and tokenizer is read from `.cache/encoded`.
        """
        examples, shares, ignored = self._read(train, validation, test)
        size = sum(len(m["content"]) for rows in examples.values() for example in rows for m in example.messages)
        key = self._key(examples, shares)
        kept = key is not None and size >= CACHED_CHARACTERS
        done = cache.load(str(key)) if kept else None
        if done is None:
            done = self._prepare(examples, shares, key).splits
            if kept:
                cache.store(str(key), done)
        return self._noted(done, examples, ignored)

    def prepare(self, train: Given, validation: Given | float, test: Given | float) -> Prepared:
        """The same, worked out anew and stored for `split` to find, with the conversations."""
        examples, shares, ignored = self._read(train, validation, test)
        done = self._prepare(examples, shares, self._key(examples, shares))
        self._noted(done.splits, examples, ignored)
        if done.splits.key is not None:
            cache.store(done.splits.key, done.splits)
        return done

    def _noted(self, done: Splits, examples: Mapping[str, Sequence[Example]], ignored: Counter[str]) -> Splits:
        """With what is known of the rows as read; not in the cache: files that differ in it give the same rows."""
        done.ignored = ignored
        done.own_system = sum(e.system not in ("", self.system) for rows in examples.values() for e in rows)
        return done

    def _read(
        self, train: Given, validation: Given | float, test: Given | float
    ) -> tuple[dict[str, list[Example]], dict[str, float], Counter[str]]:
        sources = {"test": test, "validation": validation, "train": train}
        shares = {name: source for name, source in sources.items() if isinstance(source, float)}
        ignored: Counter[str] = Counter()
        examples = {
            name: self.examples(source, True, ignored)
            for name, source in sources.items()
            if not isinstance(source, float)
        }
        return examples, shares, ignored

    def _key(self, examples: dict[str, list[Example]], shares: dict[str, float]) -> str | None:
        settings = {
            "shares": shares,
            "steps": list(self.steps),
            "answer_steps": list(self.answer_steps),
            "near": self.near,
            "max_length": self.max_length,
            "max_new_tokens": self.max_new_tokens,
        }
        return fingerprint(examples, self.contract, self.renderer, settings)

    def _prepare(self, examples: dict[str, list[Example]], shares: Mapping[str, float], key: str | None) -> Prepared:
        done = Splits(key=key)
        good: dict[str, list[Example]] = {}
        for name, given in examples.items():
            done.read[name], good[name] = len(given), []
            judged = judge(given, self.contract, self.steps, self.answer_steps, done.repairs)
            for row in shown(judged, len(given), "judging"):
                if isinstance(row, Example):
                    good[name].append(row)
                else:
                    done.quarantine.append(row)
        chosen = select(good, self.near, self.contract.sets, lambda steps, n: shown(steps, n, "comparing"))
        done.quarantine += chosen.quarantine
        done.shared = chosen.shared
        kept: dict[str, list[Example]] = {"test": [], "validation": [], **chosen.kept}
        kept = self._one_style(kept, done)
        train, kept["train"] = kept["train"], []
        test, validation = shares.get("test", 0.0), shares.get("validation", 0.0)
        for example in train:
            at = chosen.cluster[example.where]
            kept["test" if at < test else "validation" if at < test + validation else "train"].append(example)
        encoded = {name: self._encode(kept[name], done) for name in SPLITS}
        done.rows = {name: [row for _, row in pairs] for name, pairs in encoded.items()}
        examples = {name: [example for example, _ in pairs] for name, pairs in encoded.items()}
        done.origins = {name: dict(Counter(e.origin for e in rows)) for name, rows in examples.items()}
        return Prepared(done, examples, chosen.suspects)

    def _one_style(self, kept: dict[str, list[Example]], done: Splits) -> dict[str, list[Example]]:
        """Without the rows that write something in another way than most."""
        done.mixtures = mixtures([example for rows in kept.values() for example in rows], self.contract.fields)
        odd: dict[str, str] = defaultdict(str)
        for mixture in done.mixtures:
            usual = next(iter(mixture.forms))
            for form, places in mixture.minority.items():
                for where in places:
                    odd[where] = odd[where] or (
                        f"{mixture.what} of {mixture.path or 'the answer'}: {form}, most rows have {usual}"
                    )
        for rows in kept.values():
            done.quarantine += [set_aside(e, "style", odd[e.where]) for e in rows if e.where in odd]
        return {name: [e for e in rows if e.where not in odd] for name, rows in kept.items()}

    def _encode(self, examples: list[Example], done: Splits) -> list[tuple[Example, Row]]:
        rows = []
        coded = self.renderer.encode([(e.messages, e.where) for e in examples], self.contract.value_spans)
        for example, row in zip(examples, shown(coded, len(examples), "encoding"), strict=True):
            if not isinstance(row, Row):
                done.quarantine.append(set_aside(example, "unfit", str(row)))
            elif len(row) > self.max_length:
                detail = f"{len(row)} tokens, the limit is {self.max_length}"
                done.quarantine.append(set_aside(example, "too_long", detail))
            elif len(row.target) > self.max_new_tokens:
                detail = f"the answer has {len(row.target)} tokens, model.max_new_tokens is {self.max_new_tokens}"
                done.quarantine.append(set_aside(example, "too_long", detail))
            else:
                rows.append((example, replace(row, origin=example.origin)))
        return rows
