"""Conversations to token ids and back: the one renderer of training, evaluation and prediction.

What is supervised follows from structure, never from a search for marker strings:

    <bos> system user <start of assistant> | answer <end of turn> | anything the template adds after it
    ------------- prompt: context only --- | -- target: loss --- | dropped, no one has to predict it

The prompt is rendered alone, as at inference, and must be a token prefix of the whole conversation; the target must
decode to the answer, letter for letter. Other rows are not trained on. Without a chat template, `system`, the turns
and the answer are separated by blank lines and closed by EOS.

A chat template is a program. It may leave out a turn: then the row is refused. It may write today's date: that is
frozen, so that a row has the same tokens on every day.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from formtune.base.folder import check_base
from formtune.base.row import Message, Row, UnfitRow
from formtune.errors import UserError, first_line

AT_ONCE = 1024  # rows rendered and tokenised in one call

Texts = tuple[str, str | None, str | None]  # prompt, whole conversation, target


def today() -> str:
    """The date of this machine, as YYYY-MM-DD."""
    return datetime.now().date().isoformat()


@contextlib.contextmanager
def _frozen(date: str | None) -> Iterator[None]:
    """Let chat templates write `date` instead of today's: transformers takes no clock as an argument."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    if date is not None:
        day = datetime.fromisoformat(date)
        chat_template_utils.datetime = SimpleNamespace(now=lambda: day)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = clock  # type: ignore[misc]


@functools.lru_cache(maxsize=4)
def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base, trust_remote_code=False)


class Renderer:
    """Renders with a tokenizer's own chat template and proves the mask of every row.

    Args:
        tokenizer: A fast Hugging Face tokenizer; its template is used as served, with thinking switched off.
        date: Day that the template writes where it writes today's, as YYYY-MM-DD; None leaves it to the clock.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise UserError("model.base: the tokenizer has no tokenizer.json, so its offsets cannot be checked")
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        # By its text: a template may write the date in some conversations only, such as those without a system prompt.
        self.dated = "strftime_now" in str(tokenizer.chat_template)
        self.date = date if self.dated else None
        self._left_out: dict[tuple[str, ...], frozenset[int]] = {}  # turns by the roles of a conversation
        bos, probe = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        self._bos = [bos] if not self.templated and bos is not None and probe[:1] == [bos] else []
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if not self.templated and not eos:
            raise UserError("model.base: the tokenizer has neither a chat template nor an EOS token to end an answer")
        self._lead = ""  # white space that the template puts before an answer, as decoded
        self.stop_ids: tuple[int, ...] = tuple(eos)
        if self.templated:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            [texts] = self._texts([turn])
            if isinstance(texts, UnfitRow):
                raise UserError(f"model.base: {texts}")
            [(prompt_ids, target)] = self._tokens([texts])
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
    def load(cls, base: str, date: str | None = None) -> Renderer:
        """Load the tokenizer of a model folder or hub id."""
        check_base(base)
        try:
            return cls(_tokenizer(base), date)
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"model.base: no usable tokenizer in {base}: {first_line(error)}") from error

    def encode(self, rows: Sequence[tuple[list[Message], str]]) -> Iterator[Row | UnfitRow]:
        """Encode (messages, where) pairs; each yields its Row, or the UnfitRow that says why it cannot be one.

        The last turn is the assistant's, or the user's where there is no target.
        """
        # Many at once: each call into the template engine and the tokenizer (which works on all cores) has a cost. Not
        # all at once: every token's offsets would be in memory together.
        for start in range(0, len(rows), AT_ONCE):
            yield from self._encode(rows[start : start + AT_ONCE], start)

    def _encode(self, rows: Sequence[tuple[list[Message], str]], start: int) -> Iterator[Row | UnfitRow]:
        texts = self._fit_texts([messages for messages, _ in rows])
        tokens = self._tokens([text for text in texts if not isinstance(text, UnfitRow)])
        for number, ((messages, where), text) in enumerate(zip(rows, texts, strict=True), start):
            if isinstance(text, UnfitRow):
                yield text
                continue
            target = text[2]
            prompt_ids, target_ids = next(tokens)
            if isinstance(target_ids, str):
                yield UnfitRow(target_ids)
            elif target is not None and (decoded := self.answer(target_ids)[0]) != target:
                yield UnfitRow(f"the tokenizer turns the answer {target[:40]!r} into {decoded[:40]!r}")
            else:
                input = next(m["content"] for m in reversed(messages) if m["role"] == "user")
                yield Row(prompt_ids, target_ids, input, target, where, number, messages=messages)

    def answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Text of generated `ids` up to the first stop token, and whether there was one."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return self._decode(ids[:end]).removeprefix(self._lead), end is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _fit_texts(self, rows: list[list[Message]]) -> list[Texts | UnfitRow]:
        """The texts of each row, or why it has none."""
        unfit = [self._control_token(messages) for messages in rows]
        texts = iter(self._texts([messages for messages, reason in zip(rows, unfit, strict=True) if reason is None]))
        return [
            self._whole(messages, next(texts)) if reason is None else reason
            for messages, reason in zip(rows, unfit, strict=True)
        ]

    def _whole(self, messages: list[Message], texts: Texts | UnfitRow) -> Texts | UnfitRow:
        """The texts, if the prompt holds what every turn says."""
        if isinstance(texts, UnfitRow) or not self.templated:
            return texts
        context = messages if texts[2] is None else messages[:-1]
        left_out = self._turns_left_out(context)
        for number, message in enumerate(context):
            if number in left_out or not _says(texts[0], message):
                text = repr(" ".join(message["content"].split())[:40])
                turn, place = f"{message['role']} turn", "the last user turn"
                if message["role"] == "system":
                    turn, place = "system prompt", "the user turn (as in data.columns.prompt: 'Be brief. {prompt}')"
                return UnfitRow(
                    f"the chat template leaves out the {turn} {text}; write it into {place}, or take a base whose "
                    "template has it"
                )
        return texts

    def _turns_left_out(self, context: list[Message]) -> frozenset[int]:
        """Numbers of the turns that the template leaves out, found by marks: a short text may occur by chance."""
        roles = tuple(message["role"] for message in context)
        if roles not in self._left_out:
            marked = [{**message, "content": f"formtune{i}turn"} for i, message in enumerate(context)]
            [text] = self._render([marked], add_generation_prompt=True)
            # A template that refuses the marks may want JSON there, say; each row's own text is looked for anyway.
            rendered = [isinstance(text, UnfitRow) or message["content"] in text for message in marked]
            self._left_out[roles] = frozenset(i for i, there in enumerate(rendered) if not there)
        return frozenset(i for i in self._left_out[roles] if context[i]["content"].strip())

    def _control_token(self, messages: list[Message]) -> UnfitRow | None:
        for message in messages:
            if self._control is not None and (token := self._control.search(message["content"])):
                return UnfitRow(f"the text holds {token[0]}, which the tokenizer would read as a control token")
        return None

    def _texts(self, rows: list[list[Message]]) -> list[Texts | UnfitRow]:
        """Per row: the prompt's text, the whole conversation's and the target (None, None where there is none)."""
        targets = [m[-1]["content"] if m[-1]["role"] == "assistant" else None for m in rows]
        contexts = [m if target_text is None else m[:-1] for m, target_text in zip(rows, targets, strict=True)]
        if not self.templated:
            plain = ("".join(f"{m['content']}\n\n" for m in context) for context in contexts)
            return [(prompt, target_text, target_text) for prompt, target_text in zip(plain, targets, strict=True)]
        prompts = self._render(contexts, add_generation_prompt=True)
        answered = [messages for messages, target_text in zip(rows, targets, strict=True) if target_text is not None]
        wholes = iter(self._render(answered, add_generation_prompt=False))
        texts: list[Texts | UnfitRow] = []
        for prompt, target_text in zip(prompts, targets, strict=True):
            whole = None if target_text is None else next(wholes)
            refused = next((text for text in (prompt, whole) if isinstance(text, UnfitRow)), None)
            texts.append(refused or (prompt, whole, target_text))  # type: ignore[arg-type]
        return texts

    def _render(self, conversations: list[list[Message]], add_generation_prompt: bool) -> list[str | UnfitRow]:
        if not conversations:
            return []
        try:
            with _frozen(self.date):
                return self.tokenizer.apply_chat_template(
                    conversations, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
                )
        except Exception as error:  # a template is a program of whoever made the model
            if len(conversations) == 1:
                return [UnfitRow(f"the chat template refuses the conversation: {first_line(error)}")]
        # One bad conversation fails the call: halve until it is alone.
        half = len(conversations) // 2
        parts = (conversations[:half], conversations[half:])
        return [text for part in parts for text in self._render(part, add_generation_prompt)]

    def _tokens(self, texts: Sequence[Texts]) -> Iterator[tuple[list[int], Any]]:
        """Per row: prompt ids, and target ids or the reason why there are none."""
        prompts = self._coded([prompt for prompt, _, _ in texts])
        wholes = iter(self._coded([full for _, full, _ in texts if full is not None]))
        for (prompt_text, full, target_text), coded in zip(texts, prompts, strict=True):
            prompt = coded.ids
            if target_text is None or full is None:
                yield self._bos + prompt, []
                continue
            whole = next(wholes)
            ids, offsets = whole.ids, whole.offsets
            if not self.templated:
                yield self._bos + prompt, [*ids, self.tokenizer.eos_token_id]
                continue
            start = full.find(target_text, len(prompt_text))
            if not full.startswith(prompt_text) or ids[: len(prompt)] != prompt:
                yield prompt, "the prompt is not a token prefix of the conversation"
            elif start < 0:
                yield prompt, "the chat template alters the answer"
            else:
                end = start + len(target_text)
                stop = next((i for i in range(len(prompt), len(ids)) if offsets[i][0] >= end), None)
                if stop is None or ids[stop] not in self._special:
                    yield prompt, "the chat template puts no end-of-turn token right after the answer"
                else:
                    yield prompt, ids[len(prompt) : stop + 1]

    @functools.cached_property
    def _control(self) -> re.Pattern[str] | None:
        tokens = [re.escape(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(tokens)) if tokens else None

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _coded(self, texts: list[str]) -> Any:
        # The Rust tokenizer, whose truncation and padding the call in `__init__` switched off: the wrapper around it
        # takes as long again. The template already wrote the special tokens, BOS among them.
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def _says(prompt: str, message: Message) -> bool:
    """Whether a prompt holds a turn's words in order: the template may trim them or escape punctuation."""
    content = message["content"]
    if message["role"] == "assistant":
        content = content.rpartition("</think>")[2]  # templates leave out what an earlier answer thought
    if content.strip() in prompt:
        return True
    content, prompt, at = content.casefold(), prompt.casefold(), 0
    for word in re.findall(r"[^\W_]+", content):
        at = prompt.find(word, at) + len(word)
        if at < len(word):
            return False
    return True
