"""Conversations to token ids and back: the one renderer of training, evaluation and prediction.

What is supervised is decided here, once, from structure and never by searching for marker strings:

    <bos> system user <start of assistant> | answer <end of turn> | anything the template adds after it
    ------------- prompt: context only --- | -- target: loss --- | dropped, no one has to predict it

The prompt is rendered on its own, as it will be at inference, and must be a token prefix of the whole conversation;
the target must decode to the answer, letter for letter. A row for which that cannot be shown is not trained on.
Models without a chat template get `system`, the turns and the answer separated by blank lines, closed by EOS.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from formtune.errors import UserError, first_line

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Row:
    """One example in token ids.

    Args:
        prompt: Ids up to and including the opening of the assistant's turn.
        target: Ids of the answer and the end-of-turn token; empty where there is no gold answer.
        is_value: For each target id, whether it touches a value of the answer (the rest is structure).
        source: Text of the last user turn.
        gold: Text of the wanted answer, None where there is none.
        where: `file:line` the row came from.
        number: Position among the rows it was encoded with.
    """

    prompt: list[int]
    target: list[int]
    is_value: list[bool]
    source: str
    gold: str | None
    where: str
    number: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class UnfitRow(ValueError):
    """A row that this tokenizer and template cannot carry unchanged; the message says why."""


def check_base(base: str) -> str:
    """Return `base` if it is a local model folder or can be a hub id, so that a mistyped path never goes online."""
    if not Path(base).is_dir() and (not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or base.startswith(".")):
        raise UserError(f"model.base: no folder {base} (hub ids look like owner/name)")
    return base


@functools.lru_cache(maxsize=4)
def context_length(base: str) -> int | None:
    """Tokens that the base model was made for, None where its config does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(check_base(base), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None  # loading the model says what is wrong with the folder
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class Renderer:
    """Renders with a tokenizer's own chat template and proves the mask of every row.

    Args:
        tokenizer: A fast Hugging Face tokenizer; its template is used as served, with thinking switched off.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise UserError("model.base: the tokenizer has no tokenizer.json, so its offsets cannot be checked")
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        bos, probe = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        self._bos = [bos] if not self.templated and bos is not None and probe[:1] == [bos] else []
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if not self.templated and not eos:
            raise UserError("model.base: the tokenizer has neither a chat template nor an EOS token to end an answer")
        self._lead = ""  # white space that the template puts before an answer, as decoded
        self.stop_ids: tuple[int, ...] = tuple(eos)
        if self.templated:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            try:
                prompt, full, answer = self._texts(turn)
            except jinja2.TemplateError as error:
                raise UserError(f"model.base: the chat template is broken ({first_line(error)})") from None
            [(prompt_ids, target, _)] = self._tokens([(prompt, full, answer)])
            if not isinstance(target, list):
                raise UserError(f"model.base: the chat template cannot be supervised: {target}")
            self._lead = self._decode(target[:-1]).removesuffix("b")
            if self._lead.strip():
                raise UserError(f"model.base: the chat template writes {self._lead!r} before every answer")
            self.stop_ids = tuple(dict.fromkeys([target[-1], *eos]))
            if bos is not None and prompt_ids[:2] == [bos, bos]:
                raise UserError("model.base: the chat template begins with more than one BOS token")

    @classmethod
    @functools.lru_cache(maxsize=4)
    def load(cls, base: str) -> Renderer:
        """Load the tokenizer of a model folder or hub id.

        Raises:
            UserError: The tokenizer is missing or damaged.
        """
        from transformers import AutoTokenizer

        check_base(base)
        try:
            return cls(AutoTokenizer.from_pretrained(base, trust_remote_code=False))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"model.base: no usable tokenizer in {base}: {first_line(error)}") from error

    def encode(self, rows: Sequence[tuple[list[Message], str]], spans: Any = None) -> Iterable[Row | UnfitRow]:
        """Encode (messages, where) pairs; each yields its Row, or the UnfitRow that says why it cannot be one.

        Args:
            rows: Messages whose last turn is the assistant's, or the user's where there is no gold answer.
            spans: Function from the answer's text to the (start, end) spans of its values, in characters.
        """
        texts = [self._fit_texts(messages) for messages, _ in rows]
        coded = iter(self._tokens([text for text in texts if not isinstance(text, UnfitRow)]))
        for number, ((messages, where), text) in enumerate(zip(rows, texts, strict=True)):
            if isinstance(text, UnfitRow):
                yield text
                continue
            gold = text[2]
            prompt, target, offsets = next(coded)
            if isinstance(target, str):
                yield UnfitRow(target)
                continue
            is_value = [False] * len(target)
            if gold is not None:
                decoded = self.answer(target)[0]
                if decoded != gold:
                    yield UnfitRow(f"the tokenizer turns the answer {gold[:40]!r} into {decoded[:40]!r}")
                    continue
                for start, end in spans(gold) if spans else ():
                    for i, (a, b) in enumerate(offsets):
                        is_value[i] |= a < end and b > start
            source = next(m["content"] for m in reversed(messages) if m["role"] == "user")
            yield Row(prompt, target, is_value, source, gold, where, number)

    def answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Text of generated `ids` up to the first stop token, and whether there was one."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return self._decode(ids[:end]).removeprefix(self._lead), end is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _fit_texts(self, messages: list[Message]) -> tuple[str, str | None, str | None] | UnfitRow:
        """The texts of a row, or why it has none."""
        for token in self._control:
            if any(token in message["content"] for message in messages):
                return UnfitRow(f"the text holds {token}, which the tokenizer would read as a control token")
        try:
            return self._texts(messages)
        except jinja2.TemplateError as error:
            return UnfitRow(f"the chat template refuses the conversation: {first_line(error)}")

    def _texts(self, messages: list[Message]) -> tuple[str, str | None, str | None]:
        """The prompt's text, the whole conversation's text and the gold answer (None, None where there is none)."""
        gold = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        context = messages if gold is None else messages[:-1]
        if not self.templated:
            return "".join(f"{m['content']}\n\n" for m in context), gold, gold
        prompt = self._render(context, add_generation_prompt=True)
        return prompt, None if gold is None else self._render(messages, add_generation_prompt=False), gold

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )

    def _tokens(self, texts: Sequence[tuple[str, str | None, str | None]]) -> Iterable[tuple[list[int], Any, Any]]:
        """Per row: prompt ids, target ids (or the reason why there are none) and target offsets within the answer."""
        prompts = self._ids([prompt for prompt, _, _ in texts])
        wholes = iter(self._ids([full for _, full, _ in texts if full is not None]))
        for (prompt_text, full, gold), (prompt, _) in zip(texts, prompts, strict=True):
            if gold is None or full is None:
                yield self._bos + prompt, [], []
                continue
            ids, offsets = next(wholes)
            if not self.templated:
                yield self._bos + prompt, [*ids, self.tokenizer.eos_token_id], [*offsets, (len(gold), len(gold))]
                continue
            start = full.find(gold, len(prompt_text))
            if not full.startswith(prompt_text) or ids[: len(prompt)] != prompt:
                yield prompt, "the prompt is not a token prefix of the conversation", None
            elif start < 0:
                yield prompt, "the chat template alters the answer", None
            else:
                end = start + len(gold)
                stop = next((i for i in range(len(prompt), len(ids)) if offsets[i][0] >= end), None)
                if stop is None or ids[stop] not in self._special:
                    yield prompt, "the chat template puts no end-of-turn token right after the answer", None
                else:
                    yield (
                        prompt,
                        ids[len(prompt) : stop + 1],
                        [(a - start, b - start) for a, b in offsets[len(prompt) : stop + 1]],
                    )

    @functools.cached_property
    def _control(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _ids(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        # The template already wrote the special tokens: adding them again would double the BOS.
        coded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(coded["input_ids"], coded["offset_mapping"], strict=True))
