"""Constrained greedy decoding: each step chooses the most likely token that llguidance's grammar allows."""

import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.constrained.grammar import OrderedRules, declared, grammar
from formtune.errors import UserError
from formtune.formats import Format
from formtune.formats.content import Orders

MAX_SCHEMAS = 256  # compiled schemas that are kept


class Grammar:
    """A format compiled for a model's tokens.

    JSON keys come in `orders`, or in any order if that is None or rows have their own schemas.
    """

    def __init__(self, format: Format, renderer: Renderer, orders: Orders | None = None) -> None:
        try:
            from llguidance import LLExecutor, LLMatcher
            from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask_par
        except ImportError:
            raise UserError("model.constrained: needs llguidance; pip install -e '.[constrained]'") from None
        # Some models pad their vocabulary: logits beyond the tokenizer's tokens have no text and are never chosen.
        self.vocabulary = max(renderer.tokenizer.get_vocab().values()) + 1
        self.stop = frozenset(renderer.stop_ids)
        # Bitmasks of the tokens that may follow each answer, 32 tokens per number.
        self._allocate = functools.partial(allocate_token_bitmask, vocab_size=self.vocabulary)
        self._fill = functools.partial(fill_next_token_bitmask_par, LLExecutor())
        self._read: Any = LLMatcher
        self._tokenizer = _llguidance_tokenizer(renderer, self.vocabulary)
        [row] = renderer.encode([(renderer.probe, "")])
        # Spaces that chat template and tokenizer put before every answer belong to the grammar's text.
        text = self._tokenizer.decode_str(row.target_ids[:-1])  # type: ignore[union-attr]
        self._lead = text[: len(text) - len(text.lstrip())]
        # A tag such as <tool_call> may be one token, which llguidance does not match as text.
        self._added_tokens = renderer.tokenizer.added_tokens_encoder
        self._format, self._orders = format, None if format.per_row else orders
        self._compiled = functools.lru_cache(MAX_SCHEMAS)(self._compile)
        if not format.per_row:
            self._compiled(None)

    def _compile(self, schema: str | None) -> Any:
        row_format = self._format.of_row(schema)
        rules = grammar(row_format)
        if rules is None:
            raise UserError(f"model.constrained: {type(self._format).__name__} has no grammar; add a `grammar` method")
        matcher = self._matcher(rules)
        if matcher.is_error():
            raise UserError(f"model.constrained: the format cannot be written as a grammar ({_reason(matcher)})")
        # Correct only if llguidance accepts the schema itself, which is checked above.
        in_order = grammar(row_format, lambda schema: OrderedRules(schema, self._orders).text or declared(schema))
        if in_order == rules:
            return matcher
        ordered = self._matcher(str(in_order))
        if ordered.is_error():
            rank_zero_warn(f"constrained decoding allows only the schema's key order ({_reason(ordered)})")
        return matcher if ordered.is_error() else ordered

    def _matcher(self, rules: str) -> Any:
        for token, number in self._added_tokens.items():
            rules = rules.replace(f" {json.dumps(token)} ", f" <[{number}]> ")
        text = f"start: {json.dumps(self._lead) if self._lead else ''} answer\n{rules}"
        return self._read(self._tokenizer, self._read.grammar_from_lark(text), log_level=0)

    def matcher(self, row: Row) -> Any:
        """A matcher for the row's answer; a UserError names the row if its schema has no grammar."""
        try:
            return self._compiled(row.schema).deep_copy()
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None

    def accepted(self, matcher: Any, tokens: Sequence[int]) -> int:
        """Add tokens, the last of which may be a stop token, to an answer; returns how many the grammar accepts."""
        tokens = list(itertools.takewhile(lambda token: token < self.vocabulary, tokens))
        ended = bool(tokens) and tokens[-1] in self.stop
        count = matcher.try_consume_tokens(tokens[: len(tokens) - ended])
        return count + (ended and count == len(tokens) - 1 and matcher.is_accepting())

    def choose(self, matchers: Sequence[Any], logits: Tensor) -> tuple[list[int], list[float]]:
        """Add the most likely allowed token to each answer; returns these tokens with their log-probabilities."""
        size = min(self.vocabulary, logits.size(-1))
        bitmask = self._allocate(len(matchers))
        self._fill([(matcher, i) for i, matcher in enumerate(matchers)], bitmask)
        allowed = bitmask.to(logits.device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
        chosen = logits[:, :size].masked_fill(allowed.flatten(1)[:, :size] == 0, float("-inf")).argmax(-1)
        tokens = chosen.tolist()
        logprobs = logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
        for i, (matcher, token) in enumerate(zip(matchers, tokens, strict=True)):
            # A row must neither end the run nor make other processes wait: the answer so far is checked.
            if matcher.is_error() or not (token in self.stop or matcher.consume_token(token)):
                rank_zero_warn(f"constrained decoding failed and ended an answer early: {_reason(matcher)}")
                tokens[i], logprobs[i] = min(self.stop), -math.inf
        return tokens, logprobs


@functools.lru_cache(maxsize=4)  # a second for a large vocabulary, and a run needs several grammars
def _llguidance_tokenizer(renderer: Renderer, vocabulary: int) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(renderer.tokenizer, n_vocab=vocabulary, eos_token=list(renderer.stop_ids))


def _reason(matcher: Any) -> str:
    """The line of llguidance's message that names the error."""
    lines = matcher.get_error().splitlines() or ["no reason given"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"^error: |^at \d+\(\d+\): ", "", line)[:160]
