"""Export a run's adapter as production loads it, if it still answers as the adapter did."""

from __future__ import annotations

import json
import operator
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from formtune.base.folder import context_length
from formtune.base.renderer import Renderer
from formtune.base.row import Row, quantile
from formtune.configuration.task import read_task, task_parser
from formtune.configuration.yaml_file import check_yaml
from formtune.data.preparation import load_splits, production_rows
from formtune.errors import UserError
from formtune.evaluation.outcomes import RATES, Outcome, outcome, rate, read_outcomes, write_outcomes
from formtune.evaluation.statistics import mcnemar
from formtune.export.fresh_process import call_fresh
from formtune.export.measure import EXACT, QLORA, QUANTIZED, ROUNDED, Closeness, measure, merge
from formtune.export.quantize import PACKAGES, quantize
from formtune.export.rules import Plan, refuse
from formtune.files import write_json
from formtune.formats import Format
from formtune.model.lora import load_base
from formtune.training.manifest import CARD, NAME, base_files, verify, write_manifest

JUDGED = ("format/exact", "joint/exact")
COMPARED, CALIBRATION = 32, 128  # rows
COLUMNS = ("kind", *JUDGED, "weights", "tokens/s", "KL", "top-1")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What an export needs of a run."""

    folder: Path
    adapter: Path  # its folder
    manifest: dict[str, Any]  # of the adapter
    base: str
    dtype: torch.dtype  # that the base is stored in
    quantize: str | None  # how training quantized the base
    format: Format
    test: list[Row]
    outcomes: list[Outcome]  # of the test rows
    constrained: bool  # whether these outcomes come from constrained decoding
    request: dict[str, Any]  # what is measured of every model: arguments of `measure`
    calibration: list[list[int]]  # token ids of training rows


def read_run(folder: Path) -> FinishedRun:
    """Read a run, and check that adapter, base, format and rows are the ones that it was judged with."""
    from transformers import AutoConfig

    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: No such file; name the folder of a finished run, such as logs/demo/RUN")
    check_yaml(str(config))
    parser = task_parser("export")
    parser.add_argument("--model.quantize", type=Literal["4bit"] | None)
    parser.add_argument("--model.constrained", type=bool, default=False)
    task, settings = read_task(parser, ["-c", str(config)])
    manifest, base = verify(folder / "adapter"), task.model.base
    trained_on, now = manifest["base"]["files"], base_files(base)
    if changed := sorted(name for name in trained_on | now if trained_on.get(name) != now.get(name)):
        raise UserError(f"model.base: {changed[0]} of {base} is not the one that the adapter was trained on")
    # An export is judged without constrained decoding, and so must be what it is compared with.
    unconstrained = folder / "outcomes" / "adapter.jsonl"
    constrained = task.model.constrained and not unconstrained.is_file()
    path = unconstrained if task.model.constrained and not constrained else folder / "outcomes" / "after.jsonl"
    outcomes = read_outcomes(path)
    if json.loads((folder / "adapter/format.json").read_text(encoding="utf-8")) != settings.format.to_dict():
        raise UserError(f"{config}: the format is not the one that judged the run; train again")
    # Compared by content: the hash of the run's rows changes with every version of formtune.
    splits = load_splits(settings)
    test = splits.rows["test"][: len(outcomes)]
    judged = [(one.input, one.target, one.prompt_tokens) for one in outcomes]
    if [(row.input, row.target, len(row.prompt_ids)) for row in test] != judged:
        raise UserError(f"{path}: {config} makes other test rows or prompts than these; train again")
    prompts = [row.prompt_ids for row in production_rows(settings) or test]
    p95 = quantile([len(ids) for ids in prompts], 95)
    timed = next(ids for ids in prompts if len(ids) == p95)
    of_all_lengths = sorted(test, key=len)[:: max(1, len(test) // COMPARED)][:COMPARED]
    context = context_length(base) or 10**9
    return FinishedRun(
        folder=folder,
        adapter=folder / "adapter",
        manifest=manifest,
        base=base,
        dtype=getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "dtype", None) or torch.float32,
        quantize=task.model.quantize,
        format=settings.format,
        test=test,
        outcomes=outcomes,
        constrained=constrained,
        request={
            "compared": [timed, *(row.prompt_ids + row.target_ids for row in of_all_lengths)],
            "answered": [(row.prompt_ids, row.target_ids) for row in test],
            "limits": [min(task.model.max_new_tokens, context - len(row.prompt_ids)) for row in test],
            "stop": list(Renderer.load(base).stop_ids),
            "timed": timed,
        },
        calibration=[row.prompt_ids + row.target_ids for row in splits.rows["train"][:CALIBRATION]],
    )


def export(run: FinishedRun, kind: str, max_loss: float) -> None:
    """Make, measure and write one kind; its folder appears only if it loses at most `max_loss` of the rows."""
    if run.constrained and kind != "adapter":
        first = f"run formtune export {run.folder} first, which measures the adapter without it"
        raise UserError(f"--as {kind}: the run was judged under constrained decoding; {first}")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run.folder) as scratch:
        folder, merging = run.adapter, None
        if kind != "adapter":
            folder, merging = _make(run, kind, Path(scratch))
        row, outcomes = measured(run, kind, folder)
        row["merge"] = asdict(merging) if merging else None
        row["refused"] = refusal = _refusal(run, kind, row, max_loss)
        write_outcomes(run.folder / "outcomes" / f"{kind}.jsonl", outcomes)
        write_json(run.folder / "exports.json", read_exports(run.folder) | {kind: row})
        if refusal:
            raise UserError(f"--as {kind}: refused, {refusal}")
        verification = {name: row[name] for name in ("closeness", "merge", *JUDGED)}
        write_manifest(folder, kind, run.base, run.manifest["data"], verification, PACKAGES.get(kind, ()))
        if kind != "adapter":
            folder.replace(run.folder / kind)


def measured(run: FinishedRun, kind: str, folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """The figures of a folder of this kind, measured in a fresh process, and the outcomes of the test rows."""
    adapter = {"folder": str(run.adapter), "base": run.base, "quantize": run.quantize}
    model = adapter if kind == "adapter" else {"folder": str(folder)}
    reference = adapter | {"dtype": "float32"}
    result = call_fresh(measure, f"{folder} does not load", model=model, reference=reference, **run.request)
    renderer, outcomes = Renderer.load(run.base), []
    for test, ids in zip(run.test, result.pop("answers"), strict=True):
        text, finished = renderer.answer(ids)
        verdict = run.format.check(text, finished=finished, target=test.target, input=test.input)
        outcomes.append(outcome(test, text, verdict, run.format))
    row: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), **result}
    before = outcomes if run.constrained else run.outcomes
    for name in JUDGED:
        right = operator.attrgetter(RATES[name])
        changes = Counter((right(a), right(b)) for a, b in zip(before, outcomes, strict=True))
        gained, lost = changes[False, True], changes[True, False]
        row[name] = rate(outcomes, RATES[name])
        row[f"{name} against the run"] = {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    return row, outcomes


def read_exports(folder: Path) -> dict[str, Any]:
    """The figures of a run's exports by kind; none where there are none yet."""
    try:
        return dict(json.loads((folder / "exports.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def cells(kind: str, row: dict[str, Any]) -> list[str]:
    """A row of the table; rates with the rows gained and lost against the run's answers, and their McNemar test."""
    rates = []
    for name in JUDGED:
        (count, number), against = row[name], row[f"{name} against the run"]
        rates.append(f"{count / number:.1%}, +{against['gained']} -{against['lost']} (p = {against['p']:.2g})")
    closeness = row["closeness"]
    return [
        kind + (" (refused)" if row["refused"] else ""), *rates, f"{row['bytes'] / 1e6:,.1f} MB",
        f"{row['tokens_per_second']:,.0f}", f"{closeness['kl']:.1e}", f"{closeness['top1']:.1%}",
    ]  # fmt: skip


def _refusal(run: FinishedRun, kind: str, row: dict[str, Any], max_loss: float) -> str | None:
    """Why a measured export must not be used; None if it may be."""
    stored = EXACT if run.dtype is torch.float32 else ROUNDED
    tolerance = {"adapter": stored, "merged": QLORA if run.quantize else stored}.get(kind, QUANTIZED)
    if broken := tolerance.broken_by(Closeness(**row["closeness"])):
        return f"it is another model than the adapter: {broken}"
    for name in JUDGED:
        against, (count, number) = row[f"{name} against the run"], row[name]
        # One row may always go: of a hundred rows or fewer a share would be less than one, and rounding costs one too.
        if against["lost"] - against["gained"] > max(1, max_loss * number):
            before = rate(run.outcomes, RATES[name])[0]
            return f"{name} falls from {before} to {count} of {number} rows, more than --max_loss {max_loss}"
    return None


def _make(run: FinishedRun, kind: str, scratch: Path) -> tuple[Path, Closeness]:
    """A folder of this kind, and how close the merge in it came."""
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    # The full-precision base: PEFT merges into a 4-bit one silently, and the result is another model.
    base = load_base(run.base, torch.float32, None, torch.device("cpu"))
    plan = Plan(base, PeftConfig.from_pretrained(str(run.adapter)), bool(run.quantize))
    for finding in refuse(plan, ["merge" if kind == "merged" else kind]):
        print(f"warning: {finding.line}")
    model, closeness = merge(PeftModel.from_pretrained(base, run.adapter).eval(), run.request["compared"])
    if broken := EXACT.broken_by(closeness):
        raise UserError(f"--as {kind}: refused, the merged model is another one than the adapter: {broken}")
    model.to(run.dtype)
    # As it was judged: greedy, to the end of the turn, without the sampling or penalties that a base may ship.
    stop = run.request["stop"]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
    merged, folder = scratch / "merged", scratch / kind
    model.save_pretrained(merged)
    _copy_rest(run.adapter, merged)
    if kind != "merged":
        call_fresh(
            quantize, f"{kind} cannot be made", scheme=kind, source=str(merged), target=str(folder),
            rows=run.calibration, group=plan.group,
        )  # fmt: skip
        _copy_rest(run.adapter, folder)
    return folder, closeness


def _copy_rest(adapter: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, format and configuration from the adapter's folder."""
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_") and path.name not in (NAME, CARD):
            shutil.copyfile(path, folder / path.name)
