"""Measure quality on two real tasks: the base, prompted and constrained, against the tuned model.

    python quality.py OUT_DIR --data DIR --base BASE                   both tasks, seeds 0, 1 and 2
    python quality.py OUT_DIR --data DIR --base BASE --task snips --seed 0 --model.optimizer.lr 1e-3

Each run is `formtune train` in a process of its own; options that this script does not know go to it. Baselines are
measured in the first run only. What OUT_DIR has already is kept. Written is OUT_DIR/quality.md: for each way of asking
valid format, right answers and field F1 with their 95 % intervals, minutes and peak memory.

DIR holds `snips` (spoken requests -> intent and slots; CC0: train.jsonl, validation.jsonl, and intents_slots.json, the
slots of each intent) and `wnut17` (posts -> named entities; CC BY 4.0: train.jsonl, test.jsonl), as JSON Lines of
`{"prompt", "completion"}`. Test rows are drawn from the data set's own held-out rows, validation rows from its training
rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STRINGS = {"type": "array", "items": {"type": "string"}}
# Held-out files, and the text before the keys in the system prompt.
TASKS = {
    "snips": (
        "validation.jsonl",
        'Answer with one JSON object: {"intent": ..., "slots": {...}}. Intents and their slots: ',
    ),
    "wnut17": (
        "test.jsonl",
        "Answer with one JSON object that lists the named entities of the text under these keys: ",
    ),
}


def snips(folder: Path) -> tuple[dict[str, Any], str]:
    """The schema, and the words of the system prompt that name intents and slots."""
    slots_of = json.loads((folder / "intents_slots.json").read_text(encoding="utf-8"))
    slots = sorted({slot for names in slots_of.values() for slot in names})
    value = {"anyOf": [{"type": "string"}, STRINGS]}
    schema = closed({"intent": {"enum": list(slots_of)}, "slots": closed(dict.fromkeys(slots, value), required=[])})
    return schema, "; ".join(f"{intent}: {', '.join(names)}" for intent, names in slots_of.items())


def wnut17(folder: Path) -> tuple[dict[str, Any], str]:
    """The schema, and the words of the system prompt that name the kinds of entities."""
    first = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    keys = list(json.loads(first["completion"]))
    return closed(dict.fromkeys(keys, STRINGS)), ", ".join(keys)


def closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def prepare(task: str, arguments: argparse.Namespace, out: Path) -> Path:
    """Write rows, schema and configuration of a task into `out`; returns the configuration's path."""
    source, count = arguments.data / task, arguments.validation_rows
    out.mkdir(parents=True, exist_ok=True)
    test, words = TASKS[task]
    schema, keys = {"snips": snips, "wnut17": wnut17}[task](source)
    lines = sorted(set((source / "train.jsonl").read_text(encoding="utf-8").splitlines()))
    held_out = (source / test).read_text(encoding="utf-8").splitlines()
    for rows in (lines, held_out):  # Snips' rows are sorted by intent
        random.Random(0).shuffle(rows)
    parts = {
        "validation": lines[:count],
        "train": lines[count:][: arguments.rows],
        "test": held_out[: arguments.test_rows],
    }
    for name, part in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    (out / "schema.json").write_text(json.dumps(schema, indent=1), encoding="utf-8")
    config = {
        "model": {"base": arguments.base, "max_new_tokens": 128},
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


# The recipe found for this base; see docs/training.md.
RECIPE = [
    "--model.optimizer.lr=2e-3",
    "--model.lora.targets=all-linear",
    "--trainer.max_epochs=1",
]
COLUMNS = {"format/exact": "valid format", "joint/exact": "right", "content/field_f1": "field F1"}
WAYS = {
    "before": "zero-shot",
    "few_shot": "few-shot",
    "before_constrained": "constrained",
    "after": "tuned",
    "after_constrained": "tuned, constrained",
}


def train(config: Path, out: Path, seed: int, options: list[str]) -> dict[str, Any]:
    """Run the whole job; returns minutes of wall time and peak memory in GiB."""
    run = f"seed-{seed}"
    usage = out / f"{config.stem}-{run}.json"
    if not usage.is_file():
        command = [sys.executable, "-m", "formtune", "train", "-c", str(config), "--run", run, "--resume"]
        began = time.monotonic()
        with (out / f"{config.stem}-{run}.log").open("a") as log:
            process = subprocess.Popen(
                [*command, f"--seed_everything={seed}", *RECIPE, *options], cwd=out, stdout=log, stderr=log
            )
            _, status, resources = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"training failed, see {log.name}")
        figures = {"minutes": (time.monotonic() - began) / 60, "peak_gib": resources.ru_maxrss / 2**20}
        usage.write_text(json.dumps(figures), encoding="utf-8")
    return json.loads(usage.read_text(encoding="utf-8"))


def rows_of_table(folder: Path, seed: int, usage: dict[str, Any]) -> list[str]:
    """A line for each way of asking the model that a run has measured."""
    from formtune.evaluation.outcomes import read_outcomes
    from formtune.report.comparison import metrics_of

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    lines = []
    for way, name in WAYS.items():
        path = folder / f"outcomes/{way}.jsonl"
        if not path.is_file():
            continue
        outcomes = read_outcomes(path)
        measured = metrics_of(outcomes)
        cells = [
            f"{measured[key]['value']:.1%} ({' to '.join(f'{100 * end:.1f}' for end in measured[key]['interval'])})"
            for key in COLUMNS
        ]
        minutes = f"{metrics['training']['seconds'] / 60:.1f}" if way == "after" else ""
        memory = f"{usage['peak_gib']:.1f}" if way == "after" else ""
        lines.append(f"| {name} | {seed} | {len(outcomes)} | {' | '.join(cells)} | {minutes} | {memory} |")
    return lines


def main() -> None:
    """Train what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with snips and wnut17")
    parser.add_argument("--base", required=True, help="folder or Hub id of the base")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=4800, help="training rows at most")
    parser.add_argument("--validation_rows", type=int, default=150, help="decoded at every validation")
    parser.add_argument("--test_rows", type=int, help="test rows at most (default: all)")
    arguments, options = parser.parse_known_args()
    out = arguments.out.resolve()
    lines = []
    for task in arguments.task:
        config = prepare(task, arguments, out / task)
        lines += [f"## {task}\n", f"| | seed | rows | {' | '.join(COLUMNS.values())} | minutes | peak GiB |"]
        lines.append("|---|---|---|" + "---:|" * (len(COLUMNS) + 2))
        for number, seed in enumerate(arguments.seed):
            usage = train(config, out, seed, [*options, *(["--baselines=[]"] if number else [])])
            lines += rows_of_table(out / f"logs/{task}/seed-{seed}", seed, usage)
        lines.append("")
    (out / "quality.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
