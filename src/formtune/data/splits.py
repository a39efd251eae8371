"""Files to cleaned and encoded splits, so that no input stands on both sides of a split and no row is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from formtune.data import cache
from formtune.data.cleaning import Cleaned, Example, clean
from formtune.data.encoded import Splits
from formtune.data.fingerprint import fingerprint
from formtune.data.progress import shown
from formtune.data.sources import Columns, Source, open_source
from formtune.formats import Format
from formtune.rendering import Renderer, Row

# Reasons that speak of a mistake in the data; the others (duplicates, leaks, ...) are ordinary and only counted.
BAD_REASONS = ("format", "too_long", "unfit")

# Of all conversations together, about a second of work: for less, a cache costs as much as it saves.
CACHED_CHARACTERS = 500_000


class Splitter:
    """Reads, cleans, splits and encodes.

    Args:
        contract: Judges every answer.
        renderer: Turns conversations into ids.
        columns: How records become conversations.
        system: System prompt put before conversations that have none.
        steps: Names of the cleaning steps for inputs.
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
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        self.contract, self.renderer, self.columns = contract, renderer, columns
        self.system, self.steps = system, steps
        self.max_length, self.max_new_tokens = max_length, max_new_tokens

    def examples(self, source: str | Source, gold: bool) -> list[Example]:
        """The conversations of a source, the system prompt in front."""
        source = open_source(source) if isinstance(source, str) else source
        found: list[Example] = []
        for record, where in source.records():
            messages = self.columns.conversation(record, where, gold)
            if self.system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system})
            found.append(Example(messages, where))
        return found

    def split(self, train: str | Source, validation: str | float | Source, test: str | float | Source) -> Splits:
        """Rows of train, validation and test; a number is the share of train's inputs to split off by hash.

        What was worked out before for the same rows, contract and tokenizer is read from `.cache/encoded`.
        """
        sources = {"test": test, "validation": validation, "train": train}
        shares = {name: source for name, source in sources.items() if isinstance(source, float)}
        examples = {
            n: self.examples(source, gold=True) for n, source in sources.items() if not isinstance(source, float)
        }
        size = sum(len(m["content"]) for rows in examples.values() for example in rows for m in example.messages)
        key = self._key(examples, shares) if size >= CACHED_CHARACTERS else None
        if key is not None and (stored := cache.load(key)) is not None:
            return stored
        done = self._split(examples, shares)
        if key is not None:
            cache.store(key, done)
        return done

    def _key(self, examples: dict[str, list[Example]], shares: dict[str, float]) -> str | None:
        settings = {
            "shares": shares,
            "steps": list(self.steps),
            "max_length": self.max_length,
            "max_new_tokens": self.max_new_tokens,
        }
        return fingerprint(examples, self.contract, self.renderer, settings)

    def _split(self, examples: dict[str, list[Example]], shares: dict[str, float]) -> Splits:
        done = Splits()
        held_out: dict[str, str] = {}
        kept: dict[str, list[Example]] = {"test": [], "validation": []}
        for name, given in examples.items():
            cleaned = clean(shown(given, len(given), "judging"), self.contract, self.steps, held_out)
            done.read[name] = len(given)
            done.repairs += cleaned.repairs
            done.quarantine += cleaned.quarantine
            kept[name] = cleaned.kept
            held_out |= {example.key: example.where for example in cleaned.kept}
        share_test, share_validation = shares.get("test", 0.0), shares.get("validation", 0.0)
        train_examples, kept["train"] = kept["train"], []
        for example in train_examples:
            at = _hash_share(example.key)
            name = "test" if at < share_test else "validation" if at < share_test + share_validation else "train"
            kept[name].append(example)
        for name in ("train", "validation", "test"):
            done.rows[name] = self._encode(kept[name], done)
        return done

    def _encode(self, examples: list[Example], done: Splits) -> list[Row]:
        rows = []
        coded = self.renderer.encode([(e.messages, e.where) for e in examples], self.contract.value_spans)
        aside = Cleaned()
        for example, row in zip(examples, shown(coded, len(examples), "encoding"), strict=True):
            if not isinstance(row, Row):
                aside.set_aside(example, "unfit", str(row))
            elif len(row) > self.max_length:
                aside.set_aside(example, "too_long", f"{len(row)} tokens, the limit is {self.max_length}")
            elif len(row.target) > self.max_new_tokens:
                detail = f"the answer has {len(row.target)} tokens, model.max_new_tokens is {self.max_new_tokens}"
                aside.set_aside(example, "too_long", detail)
            else:
                rows.append(row)
        done.quarantine += aside.quarantine
        return rows


def _hash_share(key: str) -> float:
    """A number in [0, 1) that is a function of the text alone, so that a split survives new rows and reordering."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48
