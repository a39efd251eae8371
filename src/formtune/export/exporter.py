"""A run's adapter as production loads it, written only if it still answers as the adapter did."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from formtune.base.renderer import Renderer
from formtune.errors import UserError
from formtune.evaluation.outcomes import RATES, Outcome, rate, write_outcomes
from formtune.evaluation.statistics import rate_difference, verdict
from formtune.export.closeness import EXACT, QLORA, QUANTIZED, ROUNDED, Closeness, Tolerance
from formtune.export.finished import Finished, metrics
from formtune.export.fresh_process import Maker, packages, run_measurement, run_quantizer
from formtune.export.measure import Model, Request
from formtune.export.quantize import PACKAGES, group_size
from formtune.files import write_json
from formtune.training.manifest import CARD, KINDS, NAME, write_manifest

JUDGED = ("format/exact", "joint/exact")


def export(found: Finished, kind: str, max_loss: float, maker: Maker = Maker()) -> None:
    """Make, measure and write one kind; the folder appears under its name only when it is whole and has passed.

    Args:
        found: The run.
        kind: One of `KINDS`.
        max_loss: Share of the test rows that may be lost.
        maker: What makes GPTQ and AWQ.

    Raises:
        UserError: It cannot be made, does not load, or is another model.
    """
    if found.grammar and kind != "adapter":
        raise UserError(
            f"--as {kind}: the run was judged under a grammar, which an export is not; run formtune export "
            f"{found.folder} first, which measures the adapter without"
        )
    with tempfile.TemporaryDirectory(prefix=".export-", dir=found.folder) as scratch:
        made, merging = found.adapter, None
        if kind != "adapter":
            made, merging = _make(found, kind, Path(scratch), maker)
        row, outcomes = measured(found, kind, made)
        row["merge"] = merging.to_dict() if merging else None
        refused = reason_against(found, kind, row, outcomes, max_loss)
        write_outcomes(found.folder / "outcomes" / f"{kind}.jsonl", outcomes)
        rows = metrics(found.folder) | {kind: row | {"refused": refused}}
        write_json(found.folder / "exports.json", rows)
        if refused:
            raise UserError(f"--as {kind}: refused, {refused}")
        verification = {name: row[name] for name in ("closeness", "merge", *JUDGED)}
        write_manifest(made, kind, found.base, found.manifest["data"], verification, packages(kind, maker))
        if made != found.adapter:
            made.replace(found.folder / kind)


def measured(found: Finished, kind: str, folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """The figures of a made folder from a fresh process, and what becomes of each test row.

    Args:
        found: The run.
        kind: What the folder holds.
        folder: The folder, of a whole model or the run's adapter.
    """
    alone = kind != "adapter"
    request = Request(
        model=Model(str(folder)) if alone else Model(str(folder), found.base, quantize=found.quantize),
        reference=Model(str(found.adapter), found.base, "float32", found.quantize),
        compared=found.compared,
        answered=[(row.prompt, row.target) for row in found.test],
        timed=found.timed,
        stop=list(Renderer.load(found.base).stop_ids),
        limits=found.limits,
    )
    answer = run_measurement(request)
    outcomes = found.judge(answer.pop("answers"))
    reference = outcomes if found.grammar else found.outcomes
    row: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), **answer}
    for name in JUDGED:
        before, after = ([getattr(one, RATES[name]) for one in some] for some in (reference, outcomes))
        difference = rate_difference(before, after)
        row[name] = rate(outcomes, RATES[name])
        pairs = list(zip(before, after, strict=True))
        row[f"{name} against the run"] = {
            "gained": pairs.count((False, True)),
            "lost": pairs.count((True, False)),
            "p": difference.p,
            "verdict": verdict(difference),
        }
    return row, outcomes


def reason_against(
    found: Finished, kind: str, row: dict[str, Any], outcomes: Sequence[Outcome], max_loss: float
) -> str | None:
    """Why a measured export must not be used; None if it may."""
    if broken := _tolerance(found, kind).broken_by(Closeness(**row["closeness"])):
        return f"it is another model than the adapter: {broken}"
    for name in JUDGED:
        against = row[f"{name} against the run"]
        # One row may always go: of a hundred and less a share would be less than one, and rounding costs a row as well.
        if against["lost"] - against["gained"] > max(1, max_loss * len(outcomes)):
            return (
                f"{name} falls from {rate(found.outcomes, RATES[name])[0]} to {row[name][0]} of {len(outcomes)} rows, "
                f"more than --max_loss {max_loss}"
            )
    return None


def print_exports(rows: dict[str, Any]) -> None:
    """One row for each kind that was measured on the run's test rows."""
    table = Table("kind", *JUDGED, "weights", "tokens/s", "KL", "top-1", title="Exports", title_justify="left")
    for kind in [kind for kind in KINDS if kind in rows]:
        table.add_row(*cells(kind, rows[kind]))
    Console().print(table)


def cells(kind: str, row: dict[str, Any]) -> list[str]:
    """A row of the table: each rate, the rows gained and lost against the run's own answers, and their McNemar test."""
    rates = []
    for name in JUDGED:
        (count, number), against = row[name], row[f"{name} against the run"]
        rates.append(f"{count / number:.1%}, +{against['gained']} -{against['lost']} (p = {against['p']:.2g})")
    closeness = row["closeness"]
    speed = row["tokens_per_second"]
    return [
        kind + (" (refused)" if row["refused"] else ""), *rates, f"{row['bytes'] / 1e6:,.1f} MB",
        f"{speed:,.0f}", f"{closeness['kl']:.1e}", f"{closeness['top1']:.1%}",
    ]  # fmt: skip


def _tolerance(found: Finished, kind: str) -> Tolerance:
    if kind in PACKAGES:
        return QUANTIZED
    if kind == "merged" and found.quantize:
        return QLORA
    from formtune.export.plan import read_config

    return EXACT if str(getattr(read_config(found.base), "dtype", None)) in ("None", "torch.float32") else ROUNDED


def _make(found: Finished, kind: str, scratch: Path, maker: Maker) -> tuple[Path, Closeness]:
    """A folder of this kind, and how close the merge in it came."""
    whole, closeness, group = _merge(found, kind, scratch)
    if kind == "merged":
        return whole, closeness
    run_quantizer(kind, whole, scratch / kind, found.calibration, group, maker)
    _copy_rest(found.adapter, scratch / kind)
    return scratch / kind, closeness


def _merge(found: Finished, kind: str, scratch: Path) -> tuple[Path, Closeness, int | None]:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    from formtune.export.merge import merge
    from formtune.export.plan import plan, read_config
    from formtune.export.rules import refuse
    from formtune.model.lora import load_base

    # The base in full: into one of 4 bits PEFT merges without a word, and what comes out is another model.
    base = load_base(found.base, torch.float32, None, torch.device("cpu"))
    layers = plan(base, PeftConfig.from_pretrained(str(found.adapter)), bool(found.quantize))
    for finding in refuse(layers, ["merge" if kind == "merged" else kind]):
        print(f"warning: {finding.line}")
    model, closeness = merge(PeftModel.from_pretrained(base, found.adapter).eval(), found.compared)
    if broken := EXACT.broken_by(closeness):
        raise UserError(f"--as {kind}: refused, the merged model is another one than the adapter: {broken}")
    model.to(getattr(read_config(found.base), "dtype", None) or torch.float32)
    # As it was judged: greedy, to the end of the turn, without the sampling or penalties that a base may ship.
    stop = list(Renderer.load(found.base).stop_ids)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
    model.save_pretrained(scratch / "merged")
    _copy_rest(found.adapter, scratch / "merged")
    return scratch / "merged", closeness, group_size(inputs for inputs, _ in layers.layers.values())


def _copy_rest(adapter: Path, folder: Path) -> None:
    """Tokenizer, template, contract and configuration, as they lie beside the adapter."""
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_") and path.name not in (NAME, CARD):
            shutil.copyfile(path, folder / path.name)
