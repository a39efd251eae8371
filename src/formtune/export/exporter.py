"""Export a run's adapter, if the export answers as the adapter did."""

import operator
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from formtune.base.folder import context_length, meta_model
from formtune.data.preparation import load_splits, production_rows
from formtune.errors import UserError
from formtune.evaluation.outcomes import COMPARED, RATES, Outcome, check_answer, rate, read_outcomes, write_outcomes
from formtune.export.exported import Exported, write_usage
from formtune.export.llama_cpp import measure_gguf
from formtune.export.manifest import CARD, NAME, base_files, write_manifest
from formtune.export.measure import COMPARED_ROWS, TIMED, Reference, call_fresh, measure, merge
from formtune.export.quantize import EXTRAS, SCHEMES, folder_name
from formtune.export.rules import refuse
from formtune.files import write_json
from formtune.model.lora import load_base
from formtune.tasks.parsers import read_run

CALIBRATION = 128  # rows


class FinishedRun:
    """A run whose adapter, base, format and rows are unchanged since its evaluation."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        task, settings = read_run(folder)
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder}: no adapter; formtune train writes it, and continues an interrupted run: --resume"
            )
        base, exported = task.model.base, Exported(folder / "adapter")
        self.folder, self.exported = folder, exported
        self.format, self.renderer = settings.format, settings.renderer
        if base_files(base) != exported.manifest["base"]["files"]:
            raise UserError(f"model.base: {base} is not the base of {exported.folder}; its files differ")
        if exported.format != self.format.to_dict():
            raise UserError(f"{folder / 'config.yaml'}: the format has changed since the run; train again")
        # An export is evaluated without constrained decoding, so its reference must be too.
        unconstrained = folder / "outcomes" / "adapter.jsonl"
        self.constrained = task.model.constrained and not unconstrained.is_file()
        measured = task.model.constrained and not self.constrained
        path = unconstrained if measured else folder / "outcomes" / "after.jsonl"
        self.outcomes = read_outcomes(path)  # of the test rows
        # Compared by content: the hash of the rows changes with every version of formtune.
        splits = load_splits(settings)
        places = {row.where: row for row in splits.rows["test"]}  # data.max_evaluation_rows draws some of them
        rows = [places[outcome.where] for outcome in self.outcomes if outcome.where in places]
        expected = [(outcome.input, outcome.target, outcome.schema, outcome.prompt_tokens) for outcome in self.outcomes]
        if [(row.input, row.target, row.schema, len(row.prompt_ids)) for row in rows] != expected:
            raise UserError(f"{path}: {folder / 'config.yaml'} gives other test rows or prompts; train again")
        context = context_length(base) or 10**9
        of_all_lengths = sorted(rows, key=len)[:: -(-len(rows) // COMPARED_ROWS)]
        prompts = sorted((row.prompt_ids for row in production_rows(settings) or rows), key=len)
        timed = prompts[len(prompts) * 95 // 100][: context - TIMED]
        self.tuned = Reference(
            adapter=exported.folder, base=base, quantize=task.model.quantize,
            dtype=getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "dtype", None) or torch.float32,
            calibration=[row.prompt_ids + row.target_ids for row in splits.rows["train"][:CALIBRATION]],
            compared=[timed, *(row.prompt_ids + row.target_ids for row in of_all_lengths)],
            rows=rows, limits=[min(task.model.max_new_tokens, context - len(row.prompt_ids)) for row in rows],
            stop=self.renderer.stop_ids, tags=self.renderer.tags, timed=timed,
            schema=getattr(self.format, "schema", None) if not self.format.per_row else None,
        )  # fmt: skip


def export(run: FinishedRun, kind: str, max_loss: float, **options: Any) -> dict[str, Any]:
    """Make one kind and return its metrics; its folder is kept if it loses at most `max_loss` of the rows."""
    from peft import PeftConfig

    name, tuned = folder_name(kind, **options), run.tuned
    if run.constrained and kind != "adapter":
        remedy = f"run formtune export {run.folder} first, to measure the adapter without it"
        raise UserError(f"--as {kind}: the run was evaluated with constrained decoding; {remedy}")
    adapter = PeftConfig.from_pretrained(str(tuned.adapter))
    refuse(meta_model(tuned.base), adapter, "merge" if kind == "merged" else kind)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run.folder) as scratch:
        folder = tuned.adapter if kind == "adapter" else make(tuned, kind, Path(scratch), **options)
        if kind == "gguf":
            write_usage(folder, run.exported, tuned.schema, tuned.rows)
        metrics, outcomes = measured(run, kind, folder, max_loss)
        # Also for refused exports, which have no manifest.
        write_outcomes(run.folder / "outcomes" / f"{name}.jsonl", outcomes)
        write_json(run.folder / "outcomes" / f"{name}.json", metrics)
        if metrics["refused"]:
            raise UserError(f"--as {name}: refused, {metrics['refused']}")
        trained, packages = run.exported.manifest, EXTRAS.get(kind, ("", ()))[1]
        write_manifest(folder, kind, tuned.base, trained["data"], metrics, packages, trained.get("training"))
        if kind != "adapter":
            folder.replace(run.folder / name)
    return metrics


def measured(run: FinishedRun, kind: str, folder: Path, max_loss: float) -> tuple[dict[str, Any], list[Outcome]]:
    """The metrics of an export, with the reason if it is refused, and the outcomes of the test rows."""
    rows = run.tuned.rows
    closeness, answers, speeds = measure_fresh(run.tuned, kind, folder)
    outcomes = [check_answer(row, answer, run.renderer, run.format) for row, answer in zip(rows, answers, strict=True)]
    pairs = list(zip(outcomes if run.constrained else run.outcomes, outcomes, strict=True))
    broken = run.tuned.bounds(kind).violation(closeness)
    metrics: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")),
        **speeds,
        "closeness": asdict(closeness),
        "same_answers": sum(a.answer == b.answer for a, b in pairs),
        "refused": f"its logits differ from the adapter's in float32: {broken}" if broken else None,
    }
    for name in COMPARED:
        right = operator.attrgetter(RATES[name])
        changes = Counter((right(a), right(b)) for a, b in pairs)
        count, gained, lost = rate(outcomes, RATES[name])[0], changes[False, True], changes[True, False]
        metrics[name] = {"right": count, "rows": len(rows), "gained": gained, "lost": lost}
        # One row may always be lost: rounding costs one too, and `max_loss` may be less than one row.
        if lost - gained > max(1, max_loss * len(rows)):
            fall = f"falls from {count + lost - gained} to {count} of {len(rows)} rows"
            metrics["refused"] = metrics["refused"] or f"{name} {fall}, more than --max_loss {max_loss}"
    return metrics, outcomes


def merged(tuned: Reference) -> Any:
    """The adapter merged into its base in float32; a UserError if the result is another model."""
    from peft import PeftModel

    # The full-precision base: PEFT silently merges into a 4-bit base, which gives another model.
    base = load_base(tuned.base, torch.float32, None, torch.device("cpu"))
    return merge(PeftModel.from_pretrained(base, tuned.adapter).eval(), tuned.compared)


def make(tuned: Reference, kind: str, scratch: Path, **options: Any) -> Path:
    """Make a folder of this kind: the merged model, quantized in a fresh process if the kind is a scheme."""
    from transformers import GenerationConfig

    # A GGUF adapter stays beside its base.
    model = load_base(tuned.base, tuned.dtype, None, torch.device("cpu")) if options.get("adapter") else merged(tuned)
    source, target = scratch / "merged", scratch / kind
    # As in evaluation: greedy, to the end of the turn, without sampling or penalties of the base.
    stop = list(tuned.stop)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
    model.to(tuned.dtype).save_pretrained(source)
    # Tokenizer, chat template, format and configuration
    ignored = shutil.ignore_patterns("adapter_*", NAME, CARD)
    shutil.copytree(tuned.adapter, source, ignore=ignored, dirs_exist_ok=True)
    if kind != "merged":
        arguments = {"source": str(source), "target": str(target), "rows": tuned.calibration, **options}
        call_fresh(SCHEMES[kind], f"{kind} cannot be made", **arguments)
        shutil.copytree(tuned.adapter, target, ignore=ignored, dirs_exist_ok=True)
    return target


def measure_fresh(tuned: Reference, kind: str, folder: Path) -> Any:
    function = measure_gguf if kind == "gguf" else measure
    return call_fresh(function, f"{folder} does not load", tuned=tuned, kind=kind, folder=folder)
