"""What prompting alone reaches: the base on the test rows, zero-shot and few-shot, measured before training."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formtune.base.folder import identity
from formtune.base.renderer import Renderer
from formtune.base.row import SYSTEM_ROLES, Row
from formtune.evaluation.outcomes import Outcome, field_f1, paired, rate
from formtune.evaluation.statistics import rate_text
from formtune.files import own_code
from formtune.formats import Format
from formtune.formats.content import leaves

SHOTS = 4  # training rows in the prompt; fewer if they do not fit
ENOUGH = 0.95  # fraction of right answers with which prompting may be enough
FOLDER = Path(".cache/baseline")
MAX_ENTRIES = 24  # measurements that it keeps
PACKAGES = ("torch", "transformers", "tokenizers")  # whose versions may change an answer


def choose_shots(train: Sequence[Row], count: int, format: Format) -> list[Row]:
    """Training rows for the prompt: first those with a new label, then others, ordered by a hash of the input."""
    ordered = sorted(train, key=lambda row: hashlib.sha256(row.input.encode("utf-8", "surrogatepass")).digest())
    seen: set[tuple[str, str]] = set()
    nothing_new = []
    for row in ordered:
        row_format = format.of_row(row.schema)
        values = leaves(row_format.check(row.target or "").value)
        labels = {(path, str(value)) for _, (value, path) in values if path in row_format.derived}
        nothing_new.append(labels <= seen)
        seen |= labels
    order = sorted(range(len(ordered)), key=nothing_new.__getitem__)
    return [ordered[i] for i in order[:count]]


def shots_by_schema(train: Sequence[Row], test: Sequence[Row], format: Format) -> dict[str | None, list[Row]]:
    """Shots for each schema of the test rows: training rows of the same schema, of others if there are none."""
    same: dict[str | None, list[Row]] = defaultdict(list)
    for row in train:
        same[row.schema].append(row)
    schemas = dict.fromkeys(row.schema for row in test)
    return {schema: choose_shots(same.get(schema, train[: 10 * SHOTS]), SHOTS, format) for schema in schemas}


def few_shot_rows(
    test: Sequence[Row], shots: Mapping[str | None, Sequence[Row]], renderer: Renderer, context: int
) -> tuple[list[Row], int]:
    """The test rows with shots as earlier turns, as many as fit the context in every row, and their number."""
    for count in range(max(map(len, shots.values())), 0, -1):
        conversations = []
        for row in test:
            examples = [t for shot in shots[row.schema][:count] for t in shot.messages if t["role"] not in SYSTEM_ROLES]
            first = int(row.messages[0]["role"] in SYSTEM_ROLES)
            turns = [*row.messages[:first], *examples, *row.messages[first:]]
            conversations.append((turns, row.where, row.schema, row.tools))
        rows = [row for row in renderer.encode(conversations) if isinstance(row, Row) and len(row) <= context]
        if len(rows) == len(test):
            return rows, count
    return [], 0


def cache_entry(base: str, rows: Sequence[Row], settings: dict[str, Any], format: Format) -> Path:
    """The cache entry of a baseline, named by a hash of everything that decides its answers, code included."""
    inputs = [identity(base), settings, format.to_dict(), *map(version, PACKAGES)]
    hashed = hashlib.blake2b(json.dumps(inputs, default=str).encode(), digest_size=16)
    for path in own_code("base", "model", "formats", "evaluation", "constrained", "packing", "warm_start"):
        hashed.update(path.read_bytes())
    for row in rows:
        hashed.update(json.dumps([row.prompt_ids, row.target_ids, row.where, row.schema]).encode())
    return FOLDER / f"{hashed.hexdigest()}.json"


def best_prompt(baselines: Mapping[str, Sequence[Outcome]]) -> str:
    """The prompt with the most right answers, then most valid formats, then highest field F1, on the common rows."""
    common = dict(zip(baselines, paired(*baselines.values()), strict=True))
    return max(common, key=lambda n: (rate(common[n], "joint"), rate(common[n], "exact"), field_f1(common[n])))


def constant_answer(train: Sequence[Row], test: Sequence[Row], format: Format) -> tuple[int, int]:
    """Majority-answer accuracy, as right rows and all rows: a model below it has not learned the content."""
    inner, split = format.inner or format, format.split
    [(answer, _)] = Counter(split(row.target or "")[1] for row in train).most_common(1)
    checks = (inner.of_row(r.schema).check(answer, target=split(r.target or "")[1]) for r in test)
    return sum(check.joint for check in checks), len(test)


def prompting_verdict(prompts: Mapping[str, Sequence[Outcome]], constrained: Sequence[Outcome] | None = None) -> str:
    """What prompting and constrained decoding reach, and what is left for fine-tuning to win."""
    name = best_prompt(prompts)
    text = f"prompting ({name}) reaches {_reached(prompts[name], 'prompting')}"
    if constrained is not None:
        text += f". With constrained decoding it reaches {_reached(constrained, 'constrained decoding')}"
    return text


def _reached(outcomes: Sequence[Outcome], by: str) -> str:
    (valid, rows), (right, _) = rate(outcomes, "exact"), rate(outcomes, "joint")
    truncated = sum(outcome.kind == "truncated" for outcome in outcomes)
    return (
        f"{rate_text(valid, rows, ' valid format')} and {rate_text(right, rows, ' right')}"
        + (f", {truncated:,} of {rows:,} answers truncated" if truncated else "")
        + f": {100 * (1 - valid / rows):.1f} points of valid format and "
        f"{100 * (1 - right / rows):.1f} of right answers to gain"
        + (f", so {by} may be enough" if right / rows >= ENOUGH else "")
    )
