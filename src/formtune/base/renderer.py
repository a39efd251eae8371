"""Conversations to token ids and back: the one renderer of training, evaluation, prediction and serving."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers.decoders import DecodeStream

from formtune.base.folder import check_base
from formtune.base.row import (
    SYSTEM_ROLES,
    Message,
    Row,
    Tags,
    UnfitRow,
    check_turns,
    full_text,
    interned,
    with_json_arguments,
)
from formtune.errors import UserError, as_user_error, first_line


def today() -> str:
    """The date of this machine, as YYYY-MM-DD."""
    return datetime.now().date().isoformat()


def read_template(path: str | None) -> str | None:
    """The chat template in a file, None without a file."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # else a BOM would begin every prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text.strip():
        raise UserError(f"model.chat_template: {path} is empty; without the key, the base's own template is used")
    return text


class Renderer:
    """Renders with a tokenizer's own chat template and verifies the loss mask of every row.

        <bos> system user <start of assistant> | answer <end of turn> | anything the template adds after it
        ------------- prompt: context only --- | -- target: loss --- | dropped, never predicted

    The prompt is rendered alone, as at inference, and must be a token prefix of the whole conversation. The target must
    decode to the answer exactly. A row that fails, or of which the template leaves out a turn, is an `UnfitRow`.
    The target is all that the template writes of the answer, tool calls included.
    Without a chat template, `system`, the turns and the answer are separated by blank lines, and EOS follows.
    Thinking is on if the format has reasoning between `tags` that the template contains; else the reasoning is text.
    `date` (YYYY-MM-DD) is what a template writes as today's date; None leaves it to the clock.
    `template` is the text of a chat template that replaces the tokenizer's.
    """

    def __init__(self, tokenizer: Any, date: str | None = None, template: str | None = None, tags: Tags = None) -> None:
        if not tokenizer.is_fast:
            raise UserError("model.base: formtune needs a fast tokenizer (tokenizer.json); use another base")
        self.tokenizer = tokenizer
        self.replaced = template not in (None, tokenizer.chat_template)  # whether `template` is not the base's own
        if template is not None:
            tokenizer.chat_template = template
        self._key = "model.base" if template is None else "model.chat_template"
        self.templated = bool(tokenizer.chat_template)
        # Decided by its text: a template may write the date only in some conversations, such as those without system.
        self.date = date if "strftime_now" in str(tokenizer.chat_template) else None
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(added)
        self.tags, (self._opening, self._closing) = tags, tags or ("", "</think>")
        self._tag = self._opening or self._closing.replace("/", "")  # written by the template or the prompt
        self.thinking = bool(tags) and self._closing in str(tokenizer.chat_template)
        content = f"{self._opening}b{self._closing}b" if tags else "b"
        self.probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
        specials = [token.content for token in added.values() if token.special]
        control_tokens = [re.escape(token) for token in specials if token not in (tags or ())]
        self._special_token = re.compile("|".join(control_tokens) or r"(?!)")  # (?!) never matches
        self._missing: tuple[str, ...] = ()  # roles of a system prompt that the template does not render
        self.lead = ""  # whitespace that the template puts before an answer, as decoded
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]  # this call also switches off truncation and padding
        self._bos = [bos] if not self.templated and bos is not None and probe[:1] == [bos] else []
        self.stop_ids: tuple[int, ...] = () if eos is None else (eos,)
        if self.templated:
            self._check_template()
        elif eos is None:
            raise UserError("model.base: the tokenizer has neither a chat template nor an EOS token to end an answer")

    def _check_template(self) -> None:
        """Find the end of a turn and the whitespace before an answer; refuse a template that cannot be supervised."""
        try:
            prompt = self._render(self.probe[:1], True)
            prompt_ids = self._tokenize(prompt).ids
            target_ids = self._target(self.probe, None, prompt, prompt_ids)[1]
        except UnfitRow as error:
            raise UserError(f"{self._key}: the loss mask of the chat template cannot be verified: {error}") from None
        written = self._decode(target_ids[:-1])
        self.lead = written[: len(written) - len(written.lstrip())]
        if not self.thinking and (before := written.removesuffix(self.probe[1]["content"])) != self.lead:
            raise UserError(f"{self._key}: the chat template writes {before!r} before every answer")
        if self.thinking and prompt.rstrip().endswith(self._tag) == bool(self._opening):
            raise UserError(f"data.format.open: must be '' if the template's prompt ends with {self._tag}, else not")
        self.stop_ids = tuple(dict.fromkeys([target_ids[-1], *self.stop_ids]))
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise UserError(f"{self._key}: the chat template begins with more than one BOS token")
        systems = [{"role": role, "content": "formtune"} for role in SYSTEM_ROLES]
        renders = ["formtune" in (self._try([system, self.probe[0]], True) or "") for system in systems]
        self._missing = SYSTEM_ROLES if not renders[0] else () if renders[1] else SYSTEM_ROLES[1:]

    @property
    def note(self) -> str:
        """How prompts are rendered if a chat server renders them in another way; else empty."""
        if not self.templated:
            return (
                "the base has no chat template, which chat servers need; a prompt is the system prompt, if any, and "
                f"the input, each followed by a blank line, and {self.tokenizer.eos_token} ends the answer"
            )
        notes = []
        if self.replaced:
            notes.append(
                "model.chat_template is set: servers need the exported chat_template.jinja (vLLM: --chat-template)"
            )
        if "system" in self._missing:
            place = "in front of the first user turn, with a blank line between"
            notes.append(f"the chat template has no system role: the system prompt is {place}; servers need the same")
        return "; ".join(notes)

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """The turns for the template; without a system role, the system prompt is in front of the first user turn."""
        turns = [turn | {"role": "system"} if turn["role"] in self._missing else turn for turn in messages]
        if "system" in self._missing:
            system = [turn["content"] for turn in takewhile(lambda turn: turn["role"] == "system", turns)]
            turns = turns[len(system) :]
            first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
            if first is None:
                raise UnfitRow("the chat template has no system role, and no user turn comes before the answer")
            turns[first] = turns[first] | {"content": "\n\n".join([*system, turns[first]["content"]])}
        return turns

    @classmethod
    @functools.lru_cache(maxsize=4)
    def load(cls, base: str, date: str | None = None, template: str | None = None, tags: Tags = None) -> Renderer:
        """Load the tokenizer of a model folder or Hub id."""
        from transformers import AutoTokenizer

        check_base(base)
        with as_user_error(f"model.base: no usable tokenizer in {base}"):
            return cls(AutoTokenizer.from_pretrained(base, trust_remote_code=False), date, template, tags)

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[Row | UnfitRow]:
        """Encode tuples (messages, where, schema, tools), the last two optional; each yields a Row or an UnfitRow."""
        for number, row in enumerate(rows):
            try:
                yield self._row(number, *row)
            except UnfitRow as error:
                yield error

    def _row(
        self, number: int, messages: list[Message], where: str, schema: str | None = None, tools: str | None = None
    ) -> Row:
        for text in (*map(full_text, messages), *(turn.get("reasoning_content", "") for turn in messages), tools or ""):
            if token := self._special_token.search(text):
                raise UnfitRow(f"the text contains {token[0]}, which the tokenizer would read as a special token")
        turns = self.turns(messages)
        if self.tags and not self.thinking and turns[-1]["role"] == "assistant":
            turns[-1] = self._with_reasoning(turns[-1])
        context = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if self.templated:
            prompt = self._render(context, True, tools)
            check_turns(context, prompt, self._closing)
            if tools or any(len(turn) > 2 for turn in turns):
                self._check_parts(turns, tools)
        elif tools or any(len(turn) > 2 or turn["role"] == "tool" for turn in turns):
            raise UnfitRow("the base has no chat template for tools; use another base, or write them as text")
        else:
            prompt = "".join(f"{turn['content']}\n\n" for turn in context)
        prompt_ids = self._bos + self._tokenize(prompt).ids
        target: str | None = None
        target_ids: list[int] = []
        if context is not turns:
            target, target_ids = self._target(turns, tools, prompt, prompt_ids)
            if (decoded := self.answer(target_ids)[0]) != target:
                raise UnfitRow(f"the tokenizer turns the answer {target[:40]!r} into {decoded[:40]!r}")
        input = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
        prompt_ids, target_ids = interned(prompt_ids), interned(target_ids)
        return Row(prompt_ids, target_ids, input, target, where, number, messages=messages, schema=schema, tools=tools)

    def _with_reasoning(self, turn: Message) -> Message:
        """The turn with its reasoning in its text, as Qwen3's template writes it."""
        text = f"{self._opening}\n{turn.get('reasoning_content', '')}\n{self._closing}\n\n{turn['content']}"
        rest = {key: value for key, value in turn.items() if key != "reasoning_content"}
        return turn if self._closing in turn["content"] else rest | {"content": text}

    def _check_parts(self, turns: list[Message], tools: str | None) -> None:
        """Refuse a row if the template writes the same without its tools, calls or reasoning."""
        asks = turns[-1]["role"] != "assistant"
        text = self._render(turns, asks, tools)
        for key in ("tools", "tool_calls", "reasoning_content"):
            rest = [{name: value for name, value in turn.items() if name != key} for turn in turns]
            rest_of_tools = None if key == "tools" else tools
            if (rest, rest_of_tools) != (turns, tools) and self._try(rest, asks, rest_of_tools) == text:
                raise UnfitRow(f"the chat template leaves out `{key}`; remove it, or set model.chat_template")

    def answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of generated `ids` up to the first stop token, and whether there was one."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return self._decode(ids[:end]).removeprefix(self.lead), end is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; of several tokens that make up one character, the last one adds it."""
        backend, pieces = self.tokenizer.backend_tokenizer, []
        stream = DecodeStream(skip_special_tokens=False)
        for token in ids:
            try:
                piece = stream.step(backend, token)
            except Exception:  # bytes that are not UTF-8 break the stream (vllm-project/vllm#17448)
                stream = DecodeStream(skip_special_tokens=False)
                piece = stream.step(backend, token)
            pieces.append(piece or "")
        return pieces

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _tokenize(self, text: str) -> Any:
        # The Rust tokenizer: its wrapper takes twice as long. The template already wrote BOS.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)

    def _try(self, *args: Any) -> str | None:
        try:
            return self._render(*args)
        except UnfitRow:
            return None

    def _render(self, messages: list[Message], add_generation_prompt: bool, tools: str | None = None) -> str:
        from transformers.utils import chat_template_utils

        clock: Any = chat_template_utils.datetime
        try:
            if self.date is not None:  # transformers takes no clock as an argument
                day = datetime.fromisoformat(self.date)
                chat_template_utils.datetime = SimpleNamespace(now=lambda: day)  # type: ignore[assignment, misc]
            text = self.tokenizer.apply_chat_template(
                messages, tools=json.loads(tools) if tools else None, tokenize=False,
                add_generation_prompt=add_generation_prompt, enable_thinking=self.thinking,
            )  # fmt: skip
            if "&#34;" in text and "&#34;" not in json.dumps([messages, tools]):
                # `tojson | safe` in a template (Mistral) escapes the text beside it; given JSON text it does not.
                if (plain := with_json_arguments(messages)) == messages:
                    raise ValueError("it escapes the quotes in a text")
                return self._render(plain, add_generation_prompt, tools)
            return text
        except Exception as error:  # a template is a program by the model's author
            raise UnfitRow(f"the chat template refuses the conversation: {first_line(error)}") from None
        finally:
            chat_template_utils.datetime = clock  # type: ignore[misc]

    def _target(
        self, messages: list[Message], tools: str | None, prompt: str, prompt_ids: list[int]
    ) -> tuple[str, list[int]]:
        """The answer, and the ids of the answer and its end-of-turn token."""
        target = messages[-1]["content"]
        if not self.templated:
            return target, [*self._tokenize(target).ids, self.tokenizer.eos_token_id]
        conversation = self._render(messages, False, tools)
        encoding = self._tokenize(conversation)
        ids, offsets = encoding.ids, encoding.offsets
        if not conversation.startswith(prompt) or ids[: len(prompt_ids)] != prompt_ids:
            is_off = "reasoning_content" in messages[-1] and not self.thinking
            remedy = ", as thinking is off; remove `reasoning_content`, or use the format Reasoning" if is_off else ""
            raise UnfitRow(f"the prompt is not a token prefix of the conversation{remedy}")
        if len(messages[-1]) > 2 or self.thinking:  # the target is all up to the end of the turn
            stop = next((i for i in range(len(prompt_ids), len(ids)) if ids[i] in self.stop_ids), -1)
            target_ids = ids[len(prompt_ids) : stop + 1]
            target = self.answer(target_ids)[0]  # tokenizers put a space after a special token
            if stop < 0 or target.split() != conversation[len(prompt) : offsets[stop][0]].split():
                raise UnfitRow("the tokenizer changes the answer, or the template does not end it")
            parts = [messages[-1].get("reasoning_content", ""), *messages[-1]["content"].split(self._closing, 1)]
            if not all(part.strip().removeprefix(self._tag).strip() in target for part in parts):
                raise UnfitRow("the chat template alters the answer or its reasoning")
            return target, target_ids
        start = conversation.find(target, len(prompt))
        if start < 0:
            raise UnfitRow("the chat template alters the answer")
        end = start + len(target)
        stop = next((i for i in range(len(prompt_ids), len(ids)) if offsets[i][0] >= end), -1)
        if stop < 0 or ids[stop] not in self._special:
            raise UnfitRow("the chat template puts no end-of-turn token right after the answer")
        return target, ids[len(prompt_ids) : stop + 1]
