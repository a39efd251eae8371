"""Export a run's adapter as production loads it, if it still answers as the adapter did."""

import json
import operator
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from formtune.base.folder import context_length
from formtune.base.row import quantile
from formtune.configuration.task import read_run, task_parser
from formtune.data.preparation import load_splits, production_rows
from formtune.errors import UserError
from formtune.evaluation.outcomes import RATES, Outcome, rate, read_outcomes, write_outcomes
from formtune.export.llama_cpp import measure_gguf
from formtune.export.measure import COMPARED, TIMED, Closeness, Sample, call_fresh, measure, merge, tolerance
from formtune.export.quantize import SCHEMES, folder_name, packages
from formtune.export.rules import refuse
from formtune.export.usage import shared_schema, write_usage
from formtune.files import write_json
from formtune.model.lora import load_base
from formtune.model.micro_batches import judge
from formtune.training.manifest import CARD, NAME, base_files, verify, write_manifest

JUDGED = ("format/exact", "joint/exact")
CALIBRATION = 128  # rows


class FinishedRun:
    """What an export needs of a run, whose adapter, base, format and rows must be the ones that it was judged with."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        parser = task_parser("export")
        parser.add_argument("--model.quantize", type=Literal["4bit"] | None)
        parser.add_argument("--model.constrained", type=bool, default=False)
        task, settings = read_run(folder, parser)
        self.folder, self.adapter, self.base = folder, folder / "adapter", task.model.base
        self.quantize, self.format, self.renderer = task.model.quantize, settings.format, settings.renderer
        manifest = verify(self.adapter)
        self.data, self.training = manifest["data"], manifest.get("training")
        trained_on, now = manifest["base"]["files"], base_files(self.base)
        if changed := sorted(name for name in trained_on | now if trained_on.get(name) != now.get(name)):
            raise UserError(f"model.base: {changed[0]} of {self.base} differs from the one the adapter was trained on")
        if json.loads((self.adapter / "format.json").read_text(encoding="utf-8")) != self.format.to_dict():
            raise UserError(f"{folder / 'config.yaml'}: the format has changed since the run; train again")
        # An export is judged without constrained decoding, and so must be what it is compared with.
        path = folder / "outcomes" / "adapter.jsonl"
        self.constrained = task.model.constrained and not path.is_file()
        if self.constrained or not task.model.constrained:
            path = path.with_name("after.jsonl")
        self.outcomes = read_outcomes(path)  # of the test rows
        # Compared by content: the hash of the run's rows changes with every version of formtune.
        splits = load_splits(settings)
        self.test = splits.rows["test"][: len(self.outcomes)]
        judged = [(outcome.input, outcome.target, outcome.schema, outcome.prompt_tokens) for outcome in self.outcomes]
        if [(row.input, row.target, row.schema, len(row.prompt_ids)) for row in self.test] != judged:
            raise UserError(f"{path}: {folder / 'config.yaml'} gives other test rows or prompts; train again")
        config = AutoConfig.from_pretrained(self.base, trust_remote_code=False)
        self.dtype = getattr(config, "dtype", None) or torch.float32  # that the base is stored in
        context = context_length(self.base) or 10**9
        limits = [min(task.model.max_new_tokens, context - len(row.prompt_ids)) for row in self.test]
        of_all_lengths = sorted(self.test, key=len)[:: max(1, len(self.test) // COMPARED)][:COMPARED]
        prompts = [row.prompt_ids for row in production_rows(settings) or self.test]
        p95 = quantile([len(ids) for ids in prompts], 95)
        timed = next(ids for ids in prompts if len(ids) == p95)[: context - TIMED]
        compared = [timed, *(row.prompt_ids + row.target_ids for row in of_all_lengths)]
        self.sample = Sample(
            self.test, limits, list(self.renderer.stop_ids), compared, self.renderer.thinking, timed,
            shared_schema(self.format),
        )  # fmt: skip
        self.calibration = [row.prompt_ids + row.target_ids for row in splits.rows["train"][:CALIBRATION]]


def export(run: FinishedRun, kind: str, max_loss: float, **options: Any) -> dict[str, Any]:
    """Make and measure one kind; its folder appears only if it loses at most `max_loss` of the rows. The figures."""
    name = folder_name(kind, **options)
    if run.constrained and kind != "adapter":
        remedy = f"run formtune export {run.folder} first, which measures the adapter without it"
        raise UserError(f"--as {kind}: the run was evaluated with constrained decoding; {remedy}")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run.folder) as scratch:
        folder = run.adapter if kind == "adapter" else _make(run, kind, Path(scratch), **options)
        figures, outcomes = measured(run, kind, folder)
        write_outcomes(run.folder / "outcomes" / f"{name}.jsonl", outcomes)
        refusal = _refusal(run, kind, figures, max_loss)
        # Of refused exports too, which have no manifest.
        write_json(run.folder / "outcomes" / f"{name}.json", figures | {"refused": refusal})
        if refusal:
            raise UserError(f"--as {kind}: refused, {refusal}")
        write_manifest(folder, kind, run.base, run.data, figures, packages(kind), run.training)
        if kind != "adapter":
            folder.replace(run.folder / name)
    return figures


def measured(run: FinishedRun, kind: str, folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """The figures of a folder of this kind, measured in a fresh process, and the outcomes of the test rows."""
    adapter = {"folder": str(run.adapter), "base": run.base, "quantize": run.quantize}
    renderer = run.renderer
    model = adapter if kind == "adapter" else {"folder": str(folder)}
    closeness, answers, speeds = measure_fresh(kind, model, adapter, run.sample)
    outcomes = [judge(row, answer, renderer, run.format) for row, answer in zip(run.test, answers, strict=True)]
    before = outcomes if run.constrained else run.outcomes
    figures: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")),
        **speeds,
        "closeness": asdict(closeness),
        "same_answers": sum(a.answer == b.answer for a, b in zip(before, outcomes, strict=True)),
    }
    for name in JUDGED:
        right = operator.attrgetter(RATES[name])
        changes = Counter((right(a), right(b)) for a, b in zip(before, outcomes, strict=True))
        count, number = rate(outcomes, RATES[name])
        figures[name] = {"right": count, "rows": number, "gained": changes[False, True], "lost": changes[True, False]}
    return figures, outcomes


def _refusal(run: FinishedRun, kind: str, figures: dict[str, Any], max_loss: float) -> str | None:
    """Why a measured export must not be used; None if it may be."""
    bounds = tolerance(kind, run.dtype, run.quantize)
    if broken := bounds.broken_by(Closeness(**figures["closeness"])):
        return f"it is not the same model as the adapter: {broken}"
    for name in JUDGED:
        right, rows, gained, lost = figures[name].values()
        # One row may always be lost: rounding costs one too, and of a hundred rows or fewer a share is less than one.
        if lost - gained > max(1, max_loss * rows):
            before = right + lost - gained
            return f"{name} falls from {before} to {right} of {rows} rows, more than --max_loss {max_loss}"
    return None


def _make(run: FinishedRun, kind: str, scratch: Path, **options: Any) -> Path:
    """A folder of this kind: the adapter merged into the base, and quantized if the kind is a scheme."""
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    # The full-precision base: PEFT merges into a 4-bit one silently, and the result is another model.
    base = load_base(run.base, torch.float32, None, torch.device("cpu"))
    refuse(base, PeftConfig.from_pretrained(str(run.adapter)), "merge" if kind == "merged" else kind)
    model = merge(PeftModel.from_pretrained(base, run.adapter).eval(), run.sample.compared).to(run.dtype)
    # As it was judged: greedy, to the end of the turn, without the sampling or penalties that a base may ship.
    stop = run.sample.stop
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
    folder = scratch / "merged"
    model.save_pretrained(folder)
    # Tokenizer, chat template, format and configuration
    ignored = shutil.ignore_patterns("adapter_*", NAME, CARD)
    shutil.copytree(run.adapter, folder, ignore=ignored, dirs_exist_ok=True)
    if kind != "merged":
        source, folder = folder, scratch / kind
        convert(kind, source, folder, run.calibration, **options)
        shutil.copytree(run.adapter, folder, ignore=ignored, dirs_exist_ok=True)
    if kind == "gguf":
        write_usage(folder, run.base, run.format, run.test)
    return folder


def convert(kind: str, source: Path, target: Path, rows: list[list[int]], **options: Any) -> None:
    """Make another kind of a merged model's folder in a fresh process, calibrated on rows of token ids."""
    arguments = {"source": str(source), "target": str(target), "rows": rows, **options}
    call_fresh(SCHEMES[kind].convert, f"{kind} cannot be made", **arguments)


def measure_fresh(kind: str, model: dict[str, Any], reference: dict[str, Any], sample: Sample) -> Any:
    """What `measure` returns in a fresh process; the reference is loaded in float32."""
    function, reference = measure_gguf if kind == "gguf" else measure, reference | {"dtype": torch.float32}
    return call_fresh(function, f"{model['folder']} does not load", model=model, reference=reference, sample=sample)
