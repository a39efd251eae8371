"""What serves an exported folder elsewhere: a `Modelfile` for Ollama, and a card with commands to paste."""

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
from formtune.evaluation.page import render
from formtune.files import write_json, write_whole
from formtune.formats import Format, JsonSchema
from formtune.training.manifest import CARD

CONTEXT = 8192  # tokens that a server keeps, or as many as the test rows need: a longer context costs memory


def example(folder: Path, text: str) -> dict[str, Any]:
    """What an exported folder's configuration says of a request for a chat completion: model, messages, limit."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    format = json.loads((folder / "format.json").read_text(encoding="utf-8"))
    system = system_prompt(config["data"]["system"], format)
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns = Renderer.load(str(folder.resolve())).turns([*turns, {"role": "user", "content": text}])
    limit = config["model"]["max_new_tokens"]
    return {"model": config["task"], "temperature": 0, "max_tokens": limit, "messages": turns}


def shared_schema(format: Format) -> Any:
    """The JSON Schema of every answer; None if there is none, or one for each row."""
    return format.schema if isinstance(format, JsonSchema) and not format.per_row else None


def write_usage(folder: Path, base: str, format: Format, rows: Sequence[Row]) -> None:
    """Write a `Modelfile` and a request for Ollama, and a card with the commands that serve the file."""
    renderer = Renderer.load(str(folder.resolve()), tags=format.tags)
    request = example(folder, rows[0].input)
    schema = shared_schema(format)
    needed = max(len(row.prompt_ids) for row in rows) + request["max_tokens"]
    context = min(context_length(base) or 10**9, max(CONTEXT, needed))
    body = {"model": request["model"], "messages": request["messages"], "stream": False}
    body |= {"options": {"temperature": 0, "num_ctx": context}} | ({"format": schema} if schema else {})
    write_json(folder / "request.json", body)
    facts = {
        "request": request, "schema": schema, "context": context, "thinking": renderer.thinking,
        "template": go_template(renderer, rows), "stop": [renderer.tokenizer.decode([id]) for id in renderer.stop_ids],
    }  # fmt: skip
    for name, source in (("Modelfile", "Modelfile.jinja"), (CARD, "gguf.md.jinja")):
        write_whole(folder / name, render(f"export/{source}", **facts))


def go_template(renderer: Renderer, rows: Sequence[Row]) -> str | None:
    """The chat template in Go's syntax, as Ollama reads it; None if that does not render the rows' prompts."""
    texts = {role: f"formtune-{role}-turn" for role in ("system", "user", "assistant", "last")}
    turns = [{"role": role.replace("last", "user"), "content": text} for role, text in texts.items()]
    try:
        whole, alone = (renderer._render(part, True) for part in (turns, turns[3:]))
        system, after_system, answer, after_answer, end = re.split("|".join(texts.values()), whole)
        first = alone.removesuffix(texts["last"] + end)
    except ValueError:  # a turn is missing, or the template refuses this order
        return None
    for row in rows:
        content = [turn["content"] for turn in renderer.turns(row.messages[:-1])]
        text = system + content[0] + after_system + content[1] if len(content) == 2 else first + content[0]
        if len(content) > 2 or text + end != renderer._render(renderer.turns(row.messages[:-1]), True, row.tools):
            return None
    if renderer.tokenizer("a")["input_ids"][:1] == [renderer.tokenizer.bos_token_id]:  # Ollama adds it as well
        first, system = (text.removeprefix(renderer.tokenizer.bos_token) for text in (first, system))
    pieces = (system, answer, first, after_system, after_answer, end)
    system, answer, first, after_system, after_answer, end = (text.replace("{{", '{{ "{{" }}') for text in pieces)
    return (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}' + system + "{{ .Content }}"
        '{{ else if eq .Role "assistant" }}' + answer + "{{ .Content }}{{ else }}{{ if eq $i 0 }}" + first
        + "{{ else if eq $i 1 }}" + after_system + "{{ else }}" + after_answer + "{{ end }}{{ .Content }}"
        "{{ end }}{{ end }}" + end
    )  # fmt: skip
