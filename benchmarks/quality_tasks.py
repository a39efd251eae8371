"""Two real tasks as formtune takes them: rows, schema, system prompt and configuration.

    python quality_tasks.py OUT_DIR --data DIR --base BASE [--rows 6400]

DIR holds `snips` (spoken requests -> intent and slots; CC0) and `wnut17` (posts -> named entities; CC BY 4.0), each with
JSON Lines of `{"prompt", "completion"}`. The test rows are the data set's own held-out rows; validation rows are drawn
from its training rows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

VALIDATION_ROWS = 300
STRINGS = {"type": "array", "items": {"type": "string"}}
# Held-out files, and the text before the keys in the system prompt.
TASKS = {
    "snips": ("validation.jsonl", 'Answer with one JSON object: {"intent": ..., "slots": {...}}. Intents and their slots: '),
    "wnut17": ("test.jsonl", "Answer with one JSON object that lists the named entities of the text under these keys: "),
}


def snips(folder: Path) -> tuple[dict[str, Any], str]:
    """The schema, and the words of the system prompt that name intents and slots."""
    slots_of = json.loads((folder / "intents_slots.json").read_text(encoding="utf-8"))
    slots = sorted({slot for names in slots_of.values() for slot in names})
    value = {"anyOf": [{"type": "string"}, STRINGS]}
    schema = closed({"intent": {"enum": list(slots_of)}, "slots": closed({slot: value for slot in slots}, required=[])})
    return schema, "; ".join(f"{intent}: {', '.join(names)}" for intent, names in slots_of.items())


def wnut17(folder: Path) -> tuple[dict[str, Any], str]:
    """The schema, and the words of the system prompt that name the kinds of entities."""
    first = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    keys = list(json.loads(first["completion"]))
    return closed({key: STRINGS for key in keys}), ", ".join(keys)


def closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def prepare(task: str, data: Path, base: str, rows: int, out: Path) -> Path:
    """Write rows, schema and configuration of a task into `out`; returns the configuration's path."""
    source, out = data / task, out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    test, words = TASKS[task]
    schema, keys = {"snips": snips, "wnut17": wnut17}[task](source)
    lines = sorted(set((source / "train.jsonl").read_text(encoding="utf-8").splitlines()))
    random.Random(0).shuffle(lines)
    parts = {
        "validation": lines[:VALIDATION_ROWS],
        "train": lines[VALIDATION_ROWS:][:rows],
        "test": (source / test).read_text(encoding="utf-8").splitlines(),
    }
    for name, part in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    (out / "schema.json").write_text(json.dumps(schema, indent=1), encoding="utf-8")
    config = {
        "model": {"base": base, "max_new_tokens": 128},
        "data": {name: str(out / f"{name}.jsonl") for name in parts}
        | {
            "bad_rows": "drop",
            "system": words + keys,
            "format": {"class_path": "JsonSchema", "init_args": {"schema": str(out / "schema.json")}},
        },
    }
    path = out / f"{task}.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", type=int, default=6400)
    arguments = parser.parse_args()
    for name in TASKS:
        print(prepare(name, arguments.data, arguments.base, arguments.rows, arguments.out / name))
