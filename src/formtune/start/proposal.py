"""Proposes a task for a set of rows: the keys of its YAML, and its schema."""

import json
import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from formtune import formats
from formtune.base.folder import base_folder, check_base
from formtune.base.renderer import Renderer
from formtune.data import Columns
from formtune.data.blockers import BAD, MAX_BAD_SHARE
from formtune.data.encoded import Splits
from formtune.data.preparation import SPLITS, load_splits
from formtune.data.settings import DataSettings
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.formats.json_schema import PER_ROW
from formtune.start.guesses import Guess, guess_columns, guess_format, guess_splits, guess_system, guess_tags, read_rows

MAX_PROMPT = 4000  # characters of a system prompt that lists what is allowed
SMALL_BASE = 2**30  # bytes of weights; a smaller base needs more than the defaults, see docs/training.md
MIN_NEW_TOKENS = 16  # lowest max_new_tokens
EPOCHS, ROWS_PER_STEP, INTERVAL, VALIDATIONS = 3, 16, 100, 4  # defaults of training; validations for a diagnosis
MAX_EVALUATED = 500  # rows of an evaluation
NO_LIMIT = 10**6  # tokens
WIDTH = 100  # characters of a comment's line


def propose(
    rows: str, schema_file: Path, base: str, prompt: str | None, completion: str | None
) -> tuple[list[Guess], str | None, tuple[DataSettings, Splits] | None]:
    """The guesses for the YAML, the text of the schema's file if any, and the rows if the base is on this machine."""
    records = [*read_records(rows)]
    if not records:
        raise UserError(f"{rows}: has no rows")
    folder, columns = local_folder(base), guess_columns(records, prompt, completion)
    by_column = [guess for guess in guess_splits(records) if guess.value not in columns.values()]
    files: dict[str, Any] = {"train": rows, **files_beside(rows)}
    examples = read_rows(records, Columns(**columns))
    others = chain(*(read_records(file) for split, file in files.items() if split != "train"))
    # The format must accept the rows of all splits.
    tags, without_tags = guess_tags(examples + read_rows([*others], Columns(**columns)))
    kind, init_args, why = guess_format(
        without_tags, str(Renderer.load(base).tokenizer.chat_template) if folder else ""
    )
    guesses = [Guess("model.base", base, "choose another one with --base")]
    if folder and 0 < sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL_BASE:
        reason = "a small base learns faster with LoRA on all layers and a higher learning rate (docs/training.md)"
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2.0e-3}}
        guesses += [Guess("model.lora.targets", "all-linear", reason), Guess("model.optimizer", optimizer, "as above")]
    for split, file in files.items():
        guesses.append(Guess(f"data.{split}", file, f"{len(records):,} rows" if file == rows else f"beside {rows}"))
    guesses += [Guess("data.columns", columns, f"of the columns {', '.join(records[0][0])}")] if columns else []
    guesses += by_column
    system = None
    if not any(example.system for example in examples):
        instruction = guess_system(examples)
        reason = "removed from all prompts, which begin with it" if instruction else "no row has a system prompt"
        # `init_args` is empty if each row has its own schema.
        if system := instruction.rstrip() or instruction_for(init_args or {"schema": PER_ROW}, tags):
            guesses.append(Guess("data.system", system, reason))
    prepared = None
    if folder:
        format = getattr(formats, kind)(**init_args)
        settings = DataSettings(
            formats.Reasoning(format, **tags) if tags else format, **files, tokenizer=base, columns=Columns(**columns),
            system=system, **{key.removeprefix("data."): value for key, value, _ in by_column},
        )  # fmt: skip
        prepared = settings, check_limits(settings, guesses)
    schema = None
    if "schema" in init_args:
        schema = json.dumps(init_args["schema"], indent=2, ensure_ascii=False) + "\n"
        init_args["schema"] = str(schema_file)
    value = {"class_path": kind, "init_args": init_args} if init_args else kind
    value = {"class_path": "Reasoning", "init_args": {"format": value, **tags}} if tags else value
    guesses.append(Guess("data.format", value, why))
    groups = ("model", "data", "trainer")
    return sorted(guesses, key=lambda guess: groups.index(guess.key.partition(".")[0])), schema, prepared


def local_folder(base: str) -> Path | None:
    """The folder of a base on this machine, None if it is not here."""
    check_base(base)
    with suppress(UserError):
        return base_folder(base)
    return None


def files_beside(rows: str) -> dict[str, str]:
    """The validation and test files in the same folder, by their names."""
    path = Path(rows)
    files: dict[str, str] = {}
    stem, _, ending = path.name.partition(".")
    for word, split in SPLITS.items() if path.is_file() else ():
        for name in [stem.replace("train", word)] if "train" in stem else [word, f"{stem}_{word}", f"{stem}-{word}"]:
            if name != stem and split != "train" and (other := path.with_name(f"{name}.{ending}")).is_file():
                files[split] = str(other)
    return files


def instruction_for(init_args: dict[str, Any], tags: dict[str, Any]) -> str | None:
    """A system prompt that says what the format allows, None if it would be long."""
    think = f"Think first, between {tags['open']} and {tags['close']}. " if tags else ""
    if len(json.dumps(init_args)) > MAX_PROMPT or not init_args.keys() & {"labels", "schema"}:
        return None
    if "labels" in init_args:
        return f"{think}Answer with one of: {', '.join(init_args['labels'])}"
    return think + "Answer with one JSON document that matches this schema: {schema}"


def check_limits(settings: DataSettings, guesses: list[Guess]) -> Splits:
    """Prepare the rows; guess repairs that make answers valid, token limits, and what to do with bad rows."""
    max_length, max_new_tokens = settings.max_length, settings.max_new_tokens  # the defaults
    settings.max_length = settings.max_new_tokens = NO_LIMIT
    splits = load_splits(settings, from_cache=False)
    if fixes := [row for row in splits.quarantine if row.fix.startswith("data.repair_answers")]:
        settings.repair_answers = sorted({step for row in fixes for step in re.findall(r"\w+", row.fix)[2:]})  # type: ignore[misc]
        reason = f"makes {len(fixes):,} answers valid, such as {fixes[0].where} ({fixes[0].detail})"
        guesses.append(Guess("data.repair_answers", settings.repair_answers, reason))
        splits = load_splits(settings, from_cache=False)
    bad = [row for row in splits.quarantine if row.reason in BAD]
    # Which of several styles is right is for the user to decide: the audit lists these rows.
    if 0 < len(bad) < MAX_BAD_SHARE * splits.read.total() and all(row.reason != "style" for row in bad):
        settings.bad_rows, reason = "drop", f"{len(bad):,} rows do not fit, first {bad[0].where} ({bad[0].detail})"
        guesses.append(Guess("data.bad_rows", "drop", reason))
    settings.max_length, settings.max_new_tokens = max_length, max_new_tokens
    vars(settings).pop("limit", None)  # it follows from max_length
    if rows := [*chain(*splits.rows.values())]:
        longest, answer = max(rows, key=len), max(rows, key=lambda row: len(row.target_ids))
        if len(longest) > max_length:
            settings.max_length = len(longest)
            guesses.append(Guess("data.max_length", len(longest), f"the longest row, {longest.where}"))
        limit = min(max(2 * len(answer.target_ids), MIN_NEW_TOKENS), settings.limit)
        if not max_new_tokens / 2 < limit <= max_new_tokens:
            settings.max_new_tokens = limit
            guesses.append(Guess("model.max_new_tokens", limit, f"twice the longest answer, {answer.where}"))
    steps = EPOCHS * -(-len(splits.training) // ROWS_PER_STEP)
    if steps < VALIDATIONS * INTERVAL:
        interval = max(steps // (VALIDATIONS + 1), 1)
        reason = f"the run has about {steps} steps, and a diagnosis needs {VALIDATIONS} validations"
        guesses.append(Guess("trainer.val_check_interval", interval, reason))
    if (most := max(len(splits.rows.get(name, ())) for name in ("validation", "test"))) > MAX_EVALUATED:
        reason = f"drawn from up to {most:,} rows: evaluating all could take longer than training"
        guesses.append(Guess("data.max_evaluation_rows", MAX_EVALUATED, reason))
    return splits


def task_yaml(guesses: Iterable[Guess], head: str) -> str:
    """The YAML, each key below a comment with its reason."""
    lines, open_groups = textwrap.wrap(f"# {head}", WIDTH, subsequent_indent="# "), [""]
    for key, value, why in guesses:
        *groups, name = key.split(".")
        indent = "  " * len(groups)
        lines += [f"{'  ' * at}{group}:" for at, group in enumerate(groups) if open_groups[at : at + 1] != [group]]
        lines += textwrap.wrap(
            f"# {why}", WIDTH, initial_indent=indent, subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=WIDTH)
        lines += [f"{indent}{line}" for line in text.splitlines()]
        open_groups = groups
    return "\n".join([*lines, ""])
