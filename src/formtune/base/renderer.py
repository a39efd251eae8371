"""Conversations to token ids and back: the one renderer of training, evaluation and prediction.

What is supervised is decided here, once, from structure and never by searching for marker strings:

    <bos> system user <start of assistant> | answer <end of turn> | anything the template adds after it
    ------------- prompt: context only --- | -- target: loss --- | dropped, no one has to predict it

The prompt is rendered on its own, as it will be at inference, and must be a token prefix of the whole conversation;
the target must decode to the answer, letter for letter. A row for which that cannot be shown is not trained on.
Models without a chat template get `system`, the turns and the answer separated by blank lines, closed by EOS.

A chat template is a program: it may leave a turn out, which refuses the row, and it may write today's date, which is
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

Texts = tuple[str, str | None, str | None]  # prompt, whole conversation, gold answer


def today() -> str:
    """The date of this machine, as YYYY-MM-DD."""
    return datetime.now().date().isoformat()


@contextlib.contextmanager
def _frozen(date: str | None) -> Iterator[None]:
    """Let chat templates write `date` instead of today's.

    transformers takes no `strftime_now` as an argument (it makes plain data of all that it is given), so its clock is
    set: templates have no other way to the date.
    """
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
            [(prompt_ids, target, _)] = self._tokens([texts])
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
        """Load the tokenizer of a model folder or hub id.

        Args:
            base: The folder or id.
            date: As the class takes it.

        Raises:
            UserError: The tokenizer is missing or damaged.
        """
        check_base(base)
        try:
            return cls(_tokenizer(base), date)
        except UserError:
            raise
        except Exception as error:  # of as many kinds as there are ways to damage a file
            raise UserError(f"model.base: no usable tokenizer in {base}: {first_line(error)}") from error

    def encode(self, rows: Sequence[tuple[list[Message], str]], spans: Any = None) -> Iterator[Row | UnfitRow]:
        """Encode (messages, where) pairs; each yields its Row, or the UnfitRow that says why it cannot be one.

        Args:
            rows: Messages whose last turn is the assistant's, or the user's where there is no gold answer.
            spans: Function from the answer's text to the (start, end) spans of its values, in characters.
        """
        # Many at once, because each call into the template engine and the tokenizer (which works on all cores) has a
        # price; not all at once, because every token's offsets would then be in memory together.
        for start in range(0, len(rows), AT_ONCE):
            yield from self._encode(rows[start : start + AT_ONCE], start, spans)

    def _encode(self, rows: Sequence[tuple[list[Message], str]], start: int, spans: Any) -> Iterator[Row | UnfitRow]:
        texts = self._fit_texts([messages for messages, _ in rows])
        coded = iter(self._tokens([text for text in texts if not isinstance(text, UnfitRow)]))
        for number, ((messages, where), text) in enumerate(zip(rows, texts, strict=True), start):
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
                for begin, end in spans(gold) if spans else ():
                    for i, (a, b) in enumerate(offsets):
                        if a < end and b > begin:
                            is_value[i] = True
            source = next(m["content"] for m in reversed(messages) if m["role"] == "user")
            yield Row(prompt, target, is_value, source, gold, where, number, messages=messages)

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
                if message["role"] == "system":
                    return UnfitRow(
                        f"the chat template leaves out the system prompt {text}; write it into the user turn (as in "
                        "data.columns.prompt: 'Be brief. {prompt}'), or take a base whose template has one"
                    )
                return UnfitRow(
                    f"the chat template leaves out the {message['role']} turn {text}; write it into the last user "
                    "turn, or take a base whose template has it"
                )
        return texts

    def _turns_left_out(self, context: list[Message]) -> frozenset[int]:
        """Numbers of the turns whose place the template passes over: a short text may stand elsewhere by chance."""
        roles = tuple(message["role"] for message in context)
        if roles not in self._left_out:
            marked = [{**message, "content": f"formtune{i}turn"} for i, message in enumerate(context)]
            [text] = self._render([marked], add_generation_prompt=True)
            # A template that refuses the marks may want JSON there, say; each row's own text is looked for anyway.
            seen = [isinstance(text, UnfitRow) or message["content"] in text for message in marked]
            self._left_out[roles] = frozenset(i for i, found in enumerate(seen) if not found)
        return frozenset(i for i in self._left_out[roles] if context[i]["content"].strip())

    def _control_token(self, messages: list[Message]) -> UnfitRow | None:
        for message in messages:
            if self._control is not None and (found := self._control.search(message["content"])):
                return UnfitRow(f"the text holds {found[0]}, which the tokenizer would read as a control token")
        return None

    def _texts(self, rows: list[list[Message]]) -> list[Texts | UnfitRow]:
        """Per row: the prompt's text, the whole conversation's and the gold answer (None, None where there is none)."""
        golds = [m[-1]["content"] if m[-1]["role"] == "assistant" else None for m in rows]
        contexts = [m if gold is None else m[:-1] for m, gold in zip(rows, golds, strict=True)]
        if not self.templated:
            plain = ("".join(f"{m['content']}\n\n" for m in context) for context in contexts)
            return [(prompt, gold, gold) for prompt, gold in zip(plain, golds, strict=True)]
        prompts = self._render(contexts, add_generation_prompt=True)
        answered = [messages for messages, gold in zip(rows, golds, strict=True) if gold is not None]
        wholes = iter(self._render(answered, add_generation_prompt=False))
        texts: list[Texts | UnfitRow] = []
        for prompt, gold in zip(prompts, golds, strict=True):
            whole = None if gold is None else next(wholes)
            refused = next((text for text in (prompt, whole) if isinstance(text, UnfitRow)), None)
            texts.append(refused or (prompt, whole, gold))  # type: ignore[arg-type]
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
        # One bad conversation fails the call: halve until it stands alone.
        half = len(conversations) // 2
        parts = (conversations[:half], conversations[half:])
        return [text for part in parts for text in self._render(part, add_generation_prompt)]

    def _tokens(self, texts: Sequence[Texts]) -> Iterator[tuple[list[int], Any, Any]]:
        """Per row: prompt ids, target ids (or the reason why there are none) and target offsets within the answer."""
        prompts = self._coded([prompt for prompt, _, _ in texts])
        wholes = iter(self._coded([full for _, full, _ in texts if full is not None]))
        for (prompt_text, full, gold), coded in zip(texts, prompts, strict=True):
            prompt = coded.ids
            if gold is None or full is None:
                yield self._bos + prompt, [], []
                continue
            whole = next(wholes)
            ids, offsets = whole.ids, whole.offsets
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
    def _control(self) -> re.Pattern[str] | None:
        tokens = [re.escape(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(tokens)) if tokens else None

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _coded(self, texts: list[str]) -> Any:
        # Straight from the tokenizer in Rust, whose truncation and padding the call in `__init__` switched off: the
        # wrapper around it takes as long again. The template already wrote the special tokens, BOS above all.
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def _says(prompt: str, message: Message) -> bool:
    """Whether a prompt holds what a turn says, though the template may trim it, or escape its marks."""
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
