"""Where a JSON Schema comes from: a file, a Pydantic class, or the request that it is part of."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from formtune.errors import UserError
from formtune.formats.dialect import KEYWORDS, TYPES
from formtune.formats.strict_json import loads_strict

MAX_CHARACTERS = 2_000_000  # of a schema's file: to read a schema takes time

# What holds the schema in a request to OpenAI (response_format, tool) or Anthropic, and in a tool of MCP.
_WRAPPERS = ("schema", "json_schema", "response_format", "function", "parameters", "input_schema", "inputSchema")


def read_schema(source: str | dict[str, Any]) -> Any:
    """The schema in a file, of a Pydantic class written as `module:Class`, or as it is; no object is in it twice."""
    if not isinstance(source, str):
        try:
            return json.loads(json.dumps(source, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"data.format.schema: not valid JSON ({error})") from None
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not Path(source).exists():
        return read_schema(_class_schema(*source.split(":")))
    try:
        with Path(source).open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{source}: longer than {MAX_CHARACTERS:,} characters; a format is not that large")
        return loads_strict(text.strip())
    except OSError as error:
        raise UserError(f"data.format.schema: {source}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None


def _class_schema(module: str, name: str) -> Any:
    place = f"data.format.schema: {module}:{name}"
    try:
        cls = getattr(importlib.import_module(module), name)
        if not hasattr(cls, "model_json_schema"):
            raise UserError(f"{place} is not a Pydantic model: name a subclass of pydantic.BaseModel")
        return cls.model_json_schema()
    except UserError:
        raise
    except Exception as error:  # the module is the user's
        hint = "; pip install pydantic" if getattr(error, "name", "") == "pydantic" else ""
        raise UserError(f"{place}: {' '.join(f'{type(error).__name__}: {error}'.split())}{hint}") from None


def unwrap(schema: Any) -> tuple[Any, str]:
    """The schema within a request or tool, and the keys that lead to it; "" if it is a schema itself."""
    keys = []
    while isinstance(schema, dict) and not schema.keys() & KEYWORDS - {"type"} and schema.get("type") not in TYPES:
        inner = [key for key in _WRAPPERS if isinstance(schema.get(key), dict)]
        if len(inner) != 1:
            break
        keys += inner
        schema = schema[inner[0]]
    return schema, ".".join(keys)
