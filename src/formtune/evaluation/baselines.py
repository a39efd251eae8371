"""What prompting alone reaches: the base on the test rows, plain and with training rows as examples in its prompt.

Fine-tuning is for what prompting cannot reach, so this is measured first, on the same rows, by the same renderer and
the same contract. What was measured once for a base, rows and contract is read again from `.cache/baseline`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.evaluation.outcomes import Outcome, field_f1, rate
from formtune.evaluation.statistics import wilson
from formtune.files import write_entry
from formtune.formats import Format
from formtune.formats.content import leaves

SHOTS = 4  # training rows in the prompt, as many as fit
ENOUGH = 0.95  # share of right answers from which on it is said that prompting may do
FOLDER = Path(".cache/baseline")
KEPT = 24  # measurements
PACKAGE = Path(__file__).parents[1]


def choose_shots(train: Sequence[Row], count: int, contract: Format) -> list[Row]:
    """Training rows to show, a function of their content alone; never rows of an evaluation.

    Rows are taken in the order of a hash of their input; first those that show a label which none before them shows,
    then the rest.
    """
    ordered = sorted(train, key=lambda row: hashlib.sha256(row.source.encode("utf-8", "surrogatepass")).digest())
    chosen: list[Row] = []
    shown: set[tuple[str, Any]] = set()
    for row in ordered:
        document = contract.check(row.gold or "").value
        labels = {(path, str(value)) for _, (value, path) in leaves(document) if path in contract.derived}
        if len(chosen) < count and (labels - shown or not contract.derived):
            chosen.append(row)
            shown |= labels
    return (chosen + [row for row in ordered if row not in chosen])[:count]


def few_shot_rows(
    test: Sequence[Row], shots: Sequence[Row], renderer: Renderer, contract: Format, context: int
) -> tuple[list[Row], int]:
    """The test rows with as many shots in front as fit, and how many these are.

    Args:
        test: Rows with their turns.
        shots: Rows to show, as earlier turns of the conversation.
        renderer: Turns conversations into ids.
        contract: Marks the values of answers.
        context: Tokens that prompt and wanted answer may have together.
    """
    for count in range(len(shots), 0, -1):
        examples = [turn for row in shots[:count] for turn in row.messages if turn["role"] != "system"]
        conversations = []
        for row in test:
            system = [turn for turn in row.messages if turn["role"] == "system"]
            rest = [turn for turn in row.messages if turn["role"] != "system"]
            conversations.append((system + examples + rest, row.where))
        coded = list(renderer.encode(conversations, contract.value_spans))
        rows = [row for row in coded if isinstance(row, Row) and len(row) <= context]
        if len(rows) == len(test):
            return rows, count
    return [], 0


def baseline_key(base: str, rows: Sequence[Row], settings: dict[str, Any], contract: Format) -> str:
    """A hash of all that decides the answers of a base: its files, the rows' ids, the settings, the code.

    Weights are told apart by the names, sizes and times of their files: hashing them takes as long as loading them.
    """
    files = sorted(path for path in Path(base).glob("*") if path.is_file()) if Path(base).is_dir() else []
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    code = [*sorted((PACKAGE / "model").glob("*.py")), *sorted((PACKAGE / "formats").glob("*.py")), Path(__file__)]
    hashed = hashlib.blake2b(digest_size=16)
    known = [str(Path(base).resolve()) if files else base, stamps, settings, contract.to_dict()]
    hashed.update(json.dumps(known, default=str).encode())
    for path in code:
        hashed.update(path.read_bytes())
    for row in rows:
        hashed.update(json.dumps([row.prompt, row.target, row.where]).encode())
    return hashed.hexdigest()


def load_baseline(key: str) -> dict[str, Any] | None:
    """A measurement: its `values`, its `counts` and its `outcomes`; None if there is none."""
    try:
        found: dict[str, Any] = json.loads((FOLDER / f"{key}.json").read_text(encoding="utf-8"))
        found["outcomes"] = [Outcome(**one) for one in found["outcomes"]]
        return found
    except (OSError, ValueError, TypeError, KeyError):
        return None


def store_baseline(key: str, values: dict[str, float], counts: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Keep a measurement, whole or not at all; a folder that cannot be written is no reason to stop."""
    record = {"values": values, "counts": counts, "outcomes": [asdict(one) for one in outcomes]}
    write_entry(FOLDER / f"{key}.json", json.dumps(record).encode("ascii"), KEPT)


def best_prompt(baselines: Mapping[str, Sequence[Outcome]]) -> str:
    """The name of the prompt with the most right answers, then the most in format, then the highest field F1."""
    return max(
        baselines,
        key=lambda n: (rate(baselines[n], "joint"), rate(baselines[n], "exact"), field_f1(baselines[n])),
    )


def constant_answer(train: Sequence[Row], test: Sequence[Row], contract: Format) -> tuple[int, int]:
    """For how many test rows the most frequent training answer is right, and how many there are.

    What a model reaches that looks at no input: less than that is nothing learned of the content.
    """
    [(answer, _)] = Counter(row.gold or "" for row in train).most_common(1)
    checks = (contract.check(answer, finished=True, gold=row.gold, source=row.source) for row in test)
    return sum(check.joint for check in checks), len(test)


def prompting_verdict(prompts: Mapping[str, Sequence[Outcome]], constrained: Sequence[Outcome] | None = None) -> str:
    """What prompting reaches, alone and with a grammar, and what is left for fine-tuning to win.

    A grammar gives form and not content, so format alone decides nothing: the right answers are counted too.

    Args:
        prompts: By what it is called, the outcomes of each prompt.
        constrained: Those of the best one under the contract's grammar.
    """
    name = best_prompt(prompts)
    said = f"prompting, {name}, reaches {_reached(prompts[name], 'prompting')}"
    return said if constrained is None else f"{said}. With a grammar it reaches {_reached(constrained, 'a grammar')}"


def _reached(outcomes: Sequence[Outcome], by: str) -> str:
    parts, left = [], []
    for name, what in (("exact", "in format"), ("joint", "right")):
        count, rows = rate(outcomes, name)
        low, high = wilson(count, rows)
        parts.append(f"{count / rows:.1%} {what} ({low:.1%} to {high:.1%})")
        left.append(f"{100 * (1 - count / rows):.1f}")
    cut = sum(one.kind == "truncated" for one in outcomes)
    reached = " and ".join(parts) + (f", {cut:,} of {rows:,} answers cut for length" if cut else "")
    if count == rows:
        return f"{reached}: nothing is left to win"
    worth = f"fine-tuning has at most {left[0]} points of format and {left[1]} of right answers to win"
    return f"{reached}: {worth}" + (f", so {by} may be enough" if count / rows >= ENOUGH else "")
