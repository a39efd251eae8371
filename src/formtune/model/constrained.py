"""Constrained greedy decoding: each step takes the most likely token among those that llguidance's grammar allows."""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError
from formtune.formats import Format
from formtune.formats.key_orders import Orders
from formtune.model.loss import greedy, masked

KEPT = 256  # compiled schemas of rows


class Grammar:
    """A format, compiled for the tokens of a model; if rows have their own schemas, each schema when it is needed.

    JSON keys come in `orders`, those of the training targets; if unknown, or if rows have their own schemas, in any.
    """

    def __init__(self, format: Format, renderer: Renderer, orders: Orders | None = None) -> None:
        try:
            from llguidance import LLExecutor, LLMatcher
            from llguidance.hf import from_tokenizer
            from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask_par
        except ImportError:
            raise UserError("model.constrained: needs llguidance; pip install 'formtune[constrained]'") from None
        # Some models pad their vocabulary: logits beyond the tokenizer's tokens have no text and are never chosen.
        self.vocabulary = max(renderer.tokenizer.get_vocab().values()) + 1
        self.stop = frozenset(renderer.stop_ids)
        # Of (labels) and (pairs of matcher and label, bitmask): the tokens that may follow, 32 tokens per number.
        self.allocate = functools.partial(allocate_token_bitmask, vocab_size=self.vocabulary)
        self.fill = functools.partial(fill_next_token_bitmask_par, LLExecutor())
        self._read: Any = LLMatcher
        self._tokenizer = from_tokenizer(renderer.tokenizer, n_vocab=self.vocabulary, eos_token=list(renderer.stop_ids))
        [row] = renderer.encode([(renderer.probe, "")])
        # Spaces that chat template and tokenizer put before every answer belong to the grammar's text.
        text = self._tokenizer.decode_str(row.target_ids[:-1])  # type: ignore[union-attr]
        self._lead = text[: len(text) - len(text.lstrip())]
        # A tag such as <tool_call> may be one token, which llguidance does not take for text.
        self._added_tokens = renderer.tokenizer.added_tokens_encoder
        self._format, self._orders = format, None if format.per_row else orders
        self._compiled = functools.lru_cache(KEPT)(self._compile)
        if not format.per_row:
            self._compiled(None)

    def _compile(self, schema: str | None) -> Any:
        own = self._format.of_row(schema)
        rules = own.grammar()
        if rules is None:
            name = type(self._format).__name__
            raise UserError(f"model.constrained: {name} has no grammar; give it a `grammar` method")
        matcher = self._matcher(rules)
        if matcher.is_error():
            raise UserError(f"model.constrained: the format cannot be put in a grammar ({_reason(matcher)})")
        rules, _ = own.ordered_grammar(self._orders)  # right only where llguidance takes the schema as it is
        if not rules:
            return matcher
        ordered = self._matcher(rules)
        if ordered.is_error():
            rank_zero_warn(f"constrained decoding keeps the schema's order of keys ({_reason(ordered)})")
        return matcher if ordered.is_error() else ordered

    def _matcher(self, rules: str) -> Any:
        for token, number in self._added_tokens.items():
            rules = rules.replace(f" {json.dumps(token)} ", f" <[{number}]> ")
        text = f"start: {json.dumps(self._lead) if self._lead else ''} answer\n{rules}"
        return self._read(self._tokenizer, self._read.grammar_from_lark(text), log_level=0)

    def matcher(self, row: Row) -> Any:
        """A matcher for the row's answer; raises a UserError with the row's place if its schema has no grammar."""
        try:
            return self._compiled(row.schema).deep_copy()
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None


class Documents:
    """The answers of some rows as generated so far; a matcher for each knows which tokens may follow."""

    def __init__(self, grammar: Grammar, rows: Sequence[Row]) -> None:
        self._grammar = grammar
        self._matchers = [grammar.matcher(row) for row in rows]

    def write(self, row: int, tokens: Sequence[int]) -> int:
        """Add tokens to an answer, of which the last may be a stop token; returns how many the grammar accepts."""
        matcher, ended = self._matchers[row], tokens[-1] in self._grammar.stop
        accepted = matcher.try_consume_tokens(list(tokens[: len(tokens) - ended]))
        return accepted + (ended and accepted == len(tokens) - 1 and matcher.is_accepting())

    def bitmask(self, targets: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
        """The tokens allowed at each label of the targets, row after row, up to one that the grammar refuses."""
        starts = [0, *itertools.accumulate(sizes)]
        bitmask = self._grammar.allocate(starts.pop())
        rows, at = list(range(len(sizes))), 0
        while rows:
            self._grammar.fill([(self._matchers[row], starts[row] + at) for row in rows], bitmask)
            # The last token of a target is the stop token, after which nothing follows.
            rows = [row for row in rows if at + 1 < sizes[row] and self.write(row, targets[row][at : at + 1])]
            at += 1
        self.reset(range(len(sizes)))
        return bitmask

    def reset(self, rows: Iterable[int]) -> None:
        """Begin these answers anew."""
        for row in rows:
            self._matchers[row].reset()

    def choose(self, rows: list[int], logits: Tensor) -> tuple[list[int], list[float]]:
        """Add the most likely allowed token to each of `rows`; returns them with their log-probabilities."""
        matchers = [self._matchers[row] for row in rows]
        bitmask, size = self._grammar.allocate(len(rows)), min(self._grammar.vocabulary, logits.size(-1))
        self._grammar.fill([(matcher, i) for i, matcher in enumerate(matchers)], bitmask)
        tokens, logprobs = (values.tolist() for values in greedy(masked(logits[:, :size], bitmask)))
        for i, (matcher, token) in enumerate(zip(matchers, tokens, strict=True)):
            # A row must neither end the run nor make other processes wait: the format judges what it has so far.
            if matcher.is_error() or not (token in self._grammar.stop or matcher.consume_token(token)):
                rank_zero_warn(f"constrained decoding failed and ended an answer early: {_reason(matcher)}")
                tokens[i], logprobs[i] = min(self._grammar.stop), -math.inf
        return tokens, logprobs


def _reason(matcher: Any) -> str:
    """The line of llguidance's message that names the error."""
    lines = matcher.get_error().splitlines() or ["no reason given"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"^error: |^at \d+\(\d+\): ", "", line)[:160]
