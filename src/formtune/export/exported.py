"""An exported folder, and the files that say how to use a GGUF file elsewhere."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from formtune.base.folder import context_length
from formtune.base.renderer import Renderer
from formtune.base.row import Message, Row
from formtune.data.settings import system_prompt
from formtune.errors import UserError
from formtune.export.gguf import ADAPTER
from formtune.export.manifest import CARD, NAME, file_hash
from formtune.files import write_atomic, write_json
from formtune.pages.page import render

KINDS = ("adapter", "merged", "int8", "nf4", "gptq", "awq", "gguf")
CONTEXT = 8192  # tokens of a server's context, or more if the test rows need them: a longer context costs memory
PIECES = ("system", "after_system", "answer", "after_answer", "end")  # of a template, between the texts of the turns


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        files, base = manifest["files"], manifest["base"]
        texts = [base["path"], *files.values(), *base["files"].values()]
        if manifest["kind"] in KINDS and all(isinstance(text, str) for text in texts):
            return manifest
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; an exported folder has one (formtune export)") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{path}: not a manifest; export the folder again")


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest; a UserError names a listed file that is missing, changed or outside the folder."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        outside = "\0" in name or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve())
        if outside or not path.is_file() or file_hash(path) != expected:
            raise UserError(f"{path}: changed since it was exported, missing, or outside the folder; export it again")
    return manifest


class Exported:
    """A verified exported folder."""

    def __init__(self, folder: Path, outcomes: Path | None = None) -> None:
        self.folder, self.manifest = folder, verify(folder)
        self.config: Any = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        self.format: Any = json.loads((folder / "format.json").read_text(encoding="utf-8"))
        self.task, self.kind = str(self.config["task"]), self.manifest["kind"]
        self.base = self.manifest["base"]["path"] if self.kind == "adapter" else None
        # Servers do not constrain decoding: for a constrained run, the answers that `formtune export` measured without.
        answers = "after" if folder.name == "adapter" and not self.config["model"].get("constrained") else folder.name
        self.outcomes = outcomes or folder.parent / "outcomes" / f"{answers}.jsonl"  # of the test rows

    @functools.cached_property
    def renderer(self) -> Renderer:
        """The renderer, with thinking on if the format has reasoning."""
        options = self.format["init_args"]
        tags = (options["open"], options["close"]) if "close" in options else None
        return Renderer.load(str(self.folder.resolve()), tags=tags)

    def request(self, text: str, schema: str | None = None) -> dict[str, Any]:
        """A request for a chat completion: model, messages, limit."""
        system = system_prompt(self.config["data"]["system"], self.format)
        system = system.replace("{schema}", schema) if system and schema is not None else system
        turns: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        turns = self.renderer.turns([*turns, {"role": "user", "content": text}])
        limits = {"temperature": 0, "max_tokens": self.config["model"]["max_new_tokens"]}
        inner = self.format["init_args"].get("format", self.format)  # of the answer after the reasoning
        calls = schema is not None and inner["class_path"].endswith(".ToolCalls")
        tools = {"tools": json.loads(str(schema)), "tool_choice": "none"} if calls else {}
        return {"model": self.task, **limits, "messages": turns, **tools}


def write_usage(folder: Path, adapter: Exported, schema: Any, rows: Sequence[Row]) -> None:
    """Write a `Modelfile` and a request for Ollama, and a card with the commands that serve the file."""
    renderer, request = adapter.renderer, adapter.request(rows[0].input, rows[0].schema)
    needed = max(len(row.prompt_ids) for row in rows) + request["max_tokens"]
    context = min(context_length(str(adapter.base)) or 10**9, max(CONTEXT, needed))
    body = {key: request[key] for key in ("model", "messages", "tools") if key in request} | {"stream": False}
    body |= {"options": {"temperature": 0, "num_ctx": context}} | ({"format": schema} if schema else {})
    write_json(folder / "request.json", body)
    facts = {"request": request, "schema": schema, "context": context, "thinking": renderer.thinking}
    facts |= {"adapter": (folder / ADAPTER).is_file(), "per_row": rows[0].schema is not None}
    facts["template"] = go_template(renderer, rows)
    facts["stop"] = [renderer.tokenizer.decode([id]) for id in renderer.stop_ids]
    for name, source in (("Modelfile", "Modelfile.jinja"), (CARD, "gguf.md.jinja")):
        write_atomic(folder / name, render(f"export/{source}", **facts))


def go_template(renderer: Renderer, rows: Sequence[Row]) -> str | None:
    """The chat template in Go's syntax, as Ollama reads it; None if that does not render the rows' prompts."""
    texts = {role: f"formtune-{role}-turn" for role in ("system", "user", "assistant", "last")}
    turns = [{"role": role.replace("last", "user"), "content": text} for role, text in texts.items()]
    try:
        conversation, alone = (renderer._render(part, True) for part in (turns, turns[3:]))
        pieces = dict(zip(PIECES, re.split("|".join(texts.values()), conversation), strict=True))
    except ValueError:  # a turn is missing, or the template refuses this order
        return None
    pieces["first"] = alone.removesuffix(texts["last"] + pieces["end"])
    for row in rows:
        turns = renderer.turns(row.messages[:-1])
        before = ("system", "after_system") if len(turns) == 2 else ("first",) * len(turns)
        text = "".join(pieces[name] + turn["content"] for name, turn in zip(before, turns, strict=True))
        if len(turns) > 2 or text + pieces["end"] != renderer._render(turns, True, row.tools):
            return None
    if renderer.tokenizer("a")["input_ids"][:1] == [renderer.tokenizer.bos_token_id]:  # Ollama adds it too
        pieces |= {name: pieces[name].removeprefix(renderer.tokenizer.bos_token) for name in ("first", "system")}
    escaped = {name: text.replace("{{", '{{ "{{" }}') for name, text in pieces.items()}
    return render("export/turns.go.jinja", **escaped)
