"""What decides the encoded rows, in one hash: the same hash means the same rows, letter for letter.

The conversations themselves go in, not the files they were read from: reading costs a twentieth of judging and
encoding, works for a `Source` of one's own as for a file, and a system prompt or a column that changes nothing
changes no hash. Code goes in as source text, so that neither an update of formtune nor an edited class of one's own
meets rows of the day before; so do the files that a contract's arguments name. What a class of one's own reads from
a place that only its code knows is not seen: name such a file in an argument.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import formtune
from formtune.base.renderer import Renderer
from formtune.data.cleaning import Example
from formtune.formats import Format

PACKAGES = ("tokenizers", "transformers", "jinja2", "regex", "jsonschema", "referencing", "ftfy", "rensa")
PACKAGE = Path(formtune.__file__).parent


def fingerprint(
    examples: Mapping[str, Sequence[Example]], contract: Format, renderer: Renderer, settings: Mapping[str, Any]
) -> str | None:
    """A hash of 32 hexadecimal digits; None if the contract cannot be told from another by what is known of it.

    Args:
        examples: Conversations of each source, as read.
        contract: Judges the answers.
        renderer: Turns conversations into ids.
        settings: Limits, shares and cleaning steps, as plain data.
    """
    try:
        known = {
            "settings": dict(settings),
            "contract": [contract.to_dict(), contract._init_args],
            "tokenizer": _tokenizer(renderer.tokenizer) | ({"date": renderer.date} if renderer.date else {}),
            "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        }
        hashed = hashlib.blake2b(json.dumps(known).encode(), digest_size=16)
        for path in (*_own_code(), *sorted(set(_contract_code(contract))), *_files(contract._init_args)):
            hashed.update(hashlib.sha256(path.read_bytes()).digest())
    except (TypeError, ValueError, OSError):  # arguments that are no plain data, a class typed into an interpreter
        return None
    for name, rows in examples.items():
        hashed.update(f"{name} {len(rows)}".encode())
        for example in rows:
            hashed.update(json.dumps([example.where, example.messages, example.origin]).encode())
    return hashed.hexdigest()


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "pipeline": tokenizer.backend_tokenizer.to_str(),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }


def _own_code() -> Iterator[Path]:
    yield PACKAGE / "errors.py"
    for folder in ("base", "data", "formats"):
        yield from sorted((PACKAGE / folder).glob("*.py"))


def _contract_code(contract: Format) -> Iterator[Path]:
    """Source files of a contract of one's own, with those of the loaded modules that lie beside or below it."""
    homes = set()
    for cls in type(contract).__mro__:
        package = cls.__module__.partition(".")[0]
        if package not in sys.stdlib_module_names and package != "formtune":
            path = Path(inspect.getfile(cls)).resolve()
            yield path
            homes.add(path.parent)
    for module in list(sys.modules.values()) if homes else ():
        path = Path(getattr(module, "__file__", None) or "/").resolve()
        installed = "site-packages" in path.parts
        if not installed and path.suffix == ".py" and not homes.isdisjoint(path.parents) and path.is_file():
            yield path


def _files(value: Any) -> Iterator[Path]:
    """Files named in a contract's arguments: what they hold may decide its verdicts."""
    if isinstance(value, str) and len(value) < 1024 and "\0" not in value and Path(value).is_file():
        yield Path(value)
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _files(inner)
