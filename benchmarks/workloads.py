"""Write the workloads of the benchmarks: rows of token ids in a fixed order, the same for every tool.

Tools differ in templates, in truncation and in what they supervise. None of that is to be measured, so the rows are
rendered once, by formtune's own renderer, and each tool is fed the ids:

* `shared`: one system prompt of about 285 tokens (instructions and the schema), as in most format tasks;
* `plain`: no system prompt. What the chat template adds of its own stays, because a user gets it too (SmolLM2's adds
  "You are a helpful AI assistant ..."; the demo's adds nothing);
* `mixed`: four system prompts of about 100, 300, 600 and 1,000 tokens, dealt at random;
* `growth-N`: random ids, a prefix of N tokens that all rows share, 15 of each row's own and an answer of 33. Only what
  is computed counts here, and lengths can be chosen freely;
* `demo`: the demo's test rows as `formtune test` gets them, with its tokenizer and system prompt, to validate on.

    python workloads.py OUT_DIR --steps 40

writes OUT_DIR/{shared,plain,mixed,growth-0,...,demo}.json, each with
    rows: [{"prompt": [ids], "target": [ids]}, ...], the target with its end-of-turn token; 16 rows are one step
    source: where rows and tokenizer are from
    shared_prefix: tokens with which every prompt begins
    groups: only in `mixed`, the number of the system prompt of each row
    model: what a model and its decoding must know: vocabulary, pad and stop ids, tokens of the longest row
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.data.preparation import load_splits
from formtune.data.settings import DataSettings
from formtune.formats import JsonSchema

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from demo_rows import datasets

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src/formtune/demo"
SEED = 20260701
ROWS_PER_STEP = 16
SHARED = 285
MIXED = (100, 300, 600, 1000)
# The four begin differently, as four tasks or customers do: with a common beginning they would be one prefix.
LEADS = (
    "Answer every request with one JSON object and nothing else.",
    "You turn what people say into JSON. Write exactly one object that keeps the schema, without any other words.",
    "Task: structured extraction. Copy values letter for letter from the request and invent none.",
    "Read the request below, decide what it is about, and fill in the form. The form is JSON and is read by a program.",
)
GROWTH = (0, 128, 285, 512, 2048)
GROWTH_ROWS = 256
Pair = tuple[str, str]  # what is asked, what is to be answered


class Source:
    """Pairs, the names that a schema may list, and how a schema over some of the names is written."""

    def __init__(self, snips: Path, tokenizer: Path) -> None:
        if snips.is_file() and tokenizer.is_dir():
            lines = snips.read_text(encoding="utf-8").splitlines()
            self.pairs: list[Pair] = [(row["prompt"], row["completion"]) for row in map(json.loads, lines)]
            self.intents: dict[str, list[str]] = json.loads(snips.with_name("intents_slots.json").read_text())
            self.names = list(dict.fromkeys(slot for slots in self.intents.values() for slot in slots))
            self.schema: Callable[[list[str]], dict[str, Any]] = self._intent_schema
            self.tokenizer = tokenizer
            self.note = {"rows": "snips", "tokenizer": tokenizer.name}
        else:
            # Some of these break the format on purpose. That changes no timing, and more rows allow for more steps.
            self.pairs = [(row["prompt"], row["completion"]) for row in datasets()["train"]]
            self.ticket = json.loads((DEMO / "ticket.schema.json").read_text(encoding="utf-8"))
            self.names = list(self.ticket["properties"])
            self.schema = self._ticket_schema
            self.tokenizer = DEMO / "base"
            self.note = {"rows": "demo (the snips file or the tokenizer is absent)", "tokenizer": "demo"}
        random.Random(SEED).shuffle(self.pairs)  # the file is sorted by intent

    def _intent_schema(self, names: list[str]) -> dict[str, Any]:
        properties = {"intent": {"enum": list(self.intents)}, "slots": {"type": "object"}}
        properties["slots"]["propertyNames"] = {"enum": names}
        return {"type": "object", "required": ["intent", "slots"], "properties": properties}

    def _ticket_schema(self, names: list[str]) -> dict[str, Any]:
        properties = {name: self.ticket["properties"][name] for name in names}
        return {"type": "object", "required": names, "properties": properties}


def system_prompt(lead: str, tokens: int, source: Source, examples: list[Pair], count: Callable[[str], int]) -> str:
    """A system prompt whose rendered part has at most, and about, `tokens` tokens.

    The schema loses names from its end until it fits; where tokens are left over, solved examples fill them.
    """
    text = lead
    for kept in range(len(source.names), 0, -1):
        schema = json.dumps(source.schema(source.names[:kept]), separators=(",", ":"))
        if count(f"{lead}\n{schema}") <= tokens:
            text = f"{lead}\n{schema}"
            break
    for request, reply in examples:
        longer = f"{text}\nRequest: {request.strip()}\nAnswer: {reply}"
        if count(longer) <= tokens:
            text = longer
    return text


def common_prefix(rows: list[Row]) -> int:
    """Tokens with which every prompt begins."""
    first, last = min(row.prompt_ids for row in rows), max(row.prompt_ids for row in rows)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(same, min(len(first), len(last)))


def growth(prefix: int, vocabulary: int, stop: int) -> list[dict[str, list[int]]]:
    """Rows of random ids that begin with the same `prefix` tokens."""
    dice = random.Random(SEED + prefix)
    low = min(64, vocabulary // 2)  # below are control tokens

    def ids(number: int) -> list[int]:
        return [dice.randrange(low, vocabulary) for _ in range(number)]

    shared = ids(prefix)
    return [{"prompt": shared + ids(15), "target": [*ids(32), stop]} for _ in range(GROWTH_ROWS)]


def demo() -> tuple[list[Row], Renderer]:
    """The demo's test rows, cleaned, checked and rendered as configs/demo.yaml says."""
    settings = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))["data"]
    settings.pop("rows_per_step")
    format = settings.pop("format")["init_args"]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.jsonl") for name in ("train", "validation", "test", "production")}
        for name, file in files.items():
            Path(file).write_text("".join(json.dumps(row) + "\n" for row in datasets()[name]), encoding="utf-8")
        format = JsonSchema(**format | {"schema": str(ROOT / format["schema"])})
        splits = load_splits(DataSettings(format, **(settings | files), tokenizer=str(DEMO / "base")))
        return splits.rows["test"], Renderer.load(str(DEMO / "base"))


def main() -> None:
    """Write the workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps; 16 rows each")
    parser.add_argument("--snips", type=Path, default=ROOT / "../shared/data/snips/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "../shared/tokenizers/smollm2-instruct")
    args = parser.parse_args()

    source = Source(args.snips, args.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    renderer = Renderer(tokenizer)
    number = args.steps * ROWS_PER_STEP
    examples = source.pairs[-200:]  # never among the rows
    if number > len(source.pairs) - len(examples):
        parser.error(f"{len(source.pairs) - len(examples)} rows are too few for {args.steps} steps of {ROWS_PER_STEP}")

    def count(system: str) -> int:
        """Tokens of the system turn as the template writes it."""
        message = {"role": "system", "content": system}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(systems: list[str | None]) -> list[Row]:
        """One row per system prompt, in the order of the pairs; pairs that the template cannot carry are left out."""
        pairs, rows = iter(source.pairs[: -len(examples)]), []
        for system in systems:
            row: Any = None
            while not isinstance(row, Row):
                request, reply = next(pairs, (None, None))
                if request is None:
                    parser.error(f"the template carries only {len(rows)} of the {number} rows that were asked for")
                turn = [{"role": "user", "content": request}, {"role": "assistant", "content": reply}]
                first = [{"role": "system", "content": system}] if system is not None else []
                (row,) = renderer.encode([(first + turn, "")])
            rows.append(row)
        return rows

    mixed = [system_prompt(lead, size, source, examples, count) for lead, size in zip(LEADS, MIXED, strict=True)]
    groups = [i % len(mixed) for i in range(number)]
    random.Random(SEED + 1).shuffle(groups)
    systems: dict[str, list[str | None]] = {
        "shared": [system_prompt(LEADS[1], SHARED, source, examples, count)] * number,
        "plain": [None] * number,
        "mixed": [mixed[group] for group in groups],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in systems.items():
        rows = encode(chosen)
        sizes = sorted({count(system) for system in chosen if system})
        lengths = [len(row) for row in rows]
        workload = {
            "workload": name,
            "source": source.note,
            "system_tokens": sizes,
            "shared_prefix": common_prefix(rows),
            "model": {
                "vocab_size": len(tokenizer),
                "pad_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else renderer.stop_ids[0],
                "stop_ids": list(renderer.stop_ids),
                "longest_row": max(lengths),
            },
            "rows": [{"prompt": row.prompt_ids, "target": row.target_ids} for row in rows],
        } | ({"groups": groups} if name == "mixed" else {})
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(workload), encoding="utf-8")
        targets = sum(len(row.target_ids) for row in rows)
        print(
            f"{path}: {len(rows)} rows of {source.note['rows']}, {sum(lengths) / len(rows):.1f} tokens each "
            f"({targets / len(rows):.1f} in the answer), system {sizes or 'none'}, "
            f"all begin with the same {workload['shared_prefix']}"
        )

    stop = renderer.stop_ids[0]
    for prefix in GROWTH:
        name = f"growth-{prefix}"
        workload = {
            "workload": name,
            "source": {"rows": "random ids", "tokenizer": "none"},
            "shared_prefix": prefix,
            "model": {"vocab_size": len(tokenizer), "pad_id": stop, "stop_ids": [stop], "longest_row": prefix + 48},
            "rows": growth(prefix, len(tokenizer), stop),
        }
        (args.out / f"{name}.json").write_text(json.dumps(workload), encoding="utf-8")
    rows, renderer = demo()
    stops = list(renderer.stop_ids)
    workload = {
        "workload": "demo",
        "source": {"rows": "demo", "tokenizer": "demo"},
        "shared_prefix": common_prefix(rows),
        "model": {
            "vocab_size": len(renderer.tokenizer),
            "pad_id": renderer.tokenizer.pad_token_id if renderer.tokenizer.pad_token_id is not None else stops[0],
            "stop_ids": stops,
            "longest_row": max(map(len, rows)),
        },
        "rows": [{"prompt": row.prompt_ids, "target": row.target_ids} for row in rows],
    }
    (args.out / "demo.json").write_text(json.dumps(workload), encoding="utf-8")
    print(f"{args.out}/demo.json: {len(rows)} rows, all begin with the same {workload['shared_prefix']}")


if __name__ == "__main__":
    main()
