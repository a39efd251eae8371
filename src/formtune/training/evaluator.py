"""The evaluations of one `formtune train` on the test rows: baselines, tuned model, longer inputs, and their report."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from formtune.base.folder import context_length
from formtune.base.row import Row, quantile
from formtune.data.datamodule import FormatDataModule
from formtune.data.preparation import production_rows
from formtune.errors import UserError
from formtune.evaluation.baselines import (
    SHOTS,
    baseline_key,
    best_prompt,
    choose_shots,
    constant_answer,
    few_shot_rows,
    load_baseline,
    prompting_verdict,
    store_baseline,
)
from formtune.evaluation.outcomes import VIEWS, Outcome, write_outcomes
from formtune.evaluation.probe import probe_lengths, probe_rows
from formtune.evaluation.report import Run, write_run_report
from formtune.model import FormatModule
from formtune.model.batch import Decoding
from formtune.model.constrained import Grammar
from formtune.training.test_outcomes import Outcomes

Baseline = Literal["few_shot", "constrained"]
Counts = dict[str, tuple[int, int]]

TIMED_ROWS = 8  # decoded to estimate the time of the baselines
LONGEST = 2  # times the longest target: what a baseline may decode


def results(model: FormatModule) -> tuple[dict[str, float], Counts]:
    """The last evaluation's figures by the names they have in validation, and the counts behind each rate."""
    plain = {name.removeprefix("test/"): value for name, value in model.evaluation.items()}
    return {name if "/" in name else f"val/{name}": value for name, value in plain.items()}, model.counts


class Evaluator:
    """Evaluates on the test rows, and keeps the outcome of each row."""

    def __init__(self, trainer: Any, model: FormatModule, datamodule: FormatDataModule, folder: Path) -> None:
        self.trainer, self.model, self.datamodule, self.folder = trainer, model, datamodule, folder
        self._outcomes: Outcomes = next(one for one in trainer.callbacks if isinstance(one, Outcomes))
        self._kept: dict[str, list[Outcome]] = {}
        self._constrained = False  # whether constrained decoding was measured for the base, so that it is for the tuned
        self._context = context_length(model.base) or 10**9
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        self._rows, self._renderer = datamodule.rows, datamodule.settings.renderer

    def baselines(self, kinds: Sequence[Baseline], most: int) -> dict[str, Any]:
        """Figures of the base: plain (`before`), and those of `few_shot` and `before_constrained` that are asked for.

        Args:
            kinds: What to measure beside the plain base.
            most: Test rows to measure on, at most.
        """
        result: dict[str, Any] = {"counts": {}}
        test = self._rows["test"]
        sample = [test[i] for i in sorted(random.Random(0).sample(range(len(test)), min(most, len(test))))]
        self._announce(sample, len(kinds) + 1)
        plain = "zero-shot"
        prompts, outcomes = {plain: sample}, {plain: self._baseline("before", sample, result)}
        if "few_shot" in kinds:
            chosen = choose_shots(self._rows["train"], SHOTS, self.model.format)
            few, count = few_shot_rows(sample, chosen, self._renderer, self.model.format, self._context)
            if count:
                name = f"{count}-shot"
                prompts[name], outcomes[name] = few, self._baseline("few_shot", few, result)
                result["shots"] = [row.where for row in chosen[:count]]
            elif self._writes:
                print("few-shot is not measured: no example fits beside the longest test row")
        constrained = None
        if "constrained" in kinds and not self.model.constrained:  # else every evaluation is constrained
            try:
                Grammar(self.model.format, self._renderer)
            except UserError as error:
                result["no_grammar"] = str(error).removeprefix("model.constrained: ")
            else:
                self._constrained = True
                constrained = self._baseline("before_constrained", prompts[best_prompt(outcomes)], result, True)
        if self._writes:
            result["constant"] = constant_answer(self._rows["train"], test, self.model.format)
            result["prompting"] = prompting_verdict(outcomes, constrained)
            print(result["prompting"])
            if "no_grammar" in result:
                print(f"constrained decoding is not measured: {result['no_grammar']}")
        return result

    def tuned(self, result: dict[str, Any]) -> None:
        """Add the figures of the tuned model, with constrained decoding too if the base was measured so."""
        for name, constrained in (("after", False), ("after_constrained", True)):
            if not constrained or self._constrained:
                self._test(VIEWS[name], self._rows["test"], Decoding(constrained, logged=not constrained))
                self._keep(name, self._outcomes.outcomes)
                result[name], result["counts"][name] = results(self.model)

    def probe(self) -> list[dict[str, Any]]:
        """Valid format on test rows that were made longer, up to production's P99 and beyond the training rows."""
        production = production_rows(self.datamodule.settings)
        lengths = probe_lengths(
            [len(row.prompt_ids) for row in self._rows["train"]],
            [len(row.prompt_ids) for row in production],
            self._context - max(len(row.target_ids) for row in self._rows["test"]),
        )
        texts = [row.input for row in production or self._rows["train"]]
        longer = probe_rows(self._rows["test"], texts, lengths, self._renderer, self.model.format)
        rows = [row for part in longer.values() for row in part]
        if not rows:
            return []
        numbered = [replace(row, number=number) for number, row in enumerate(rows)]
        self._test("tuned, longer inputs", numbered, Decoding(logged=False))
        exact = [outcome.exact for outcome in self._outcomes.outcomes]
        if len(exact) < len(rows):  # trainer.limit_test_batches
            return []
        probes = []
        for name, part in longer.items():
            mine, exact = exact[: len(part)], exact[len(part) :]
            probes.append({"name": name, "tokens": lengths[name], "rows": len(mine), "exact": sum(mine)})
        return probes

    def report(self, result: dict[str, Any]) -> None:
        """Write the run's page and the adapter's card."""
        settings = self.datamodule.settings
        production = production_rows(settings)
        splits = self.datamodule.splits
        assert splits is not None
        run = Run(
            name=f"{self.folder.parent.name}/{self.folder.name}",
            result=result,
            outcomes=self._kept,
            format=self.model.format,
            longest=max(len(row.prompt_ids) for row in self._rows["train"]),
            production_p95=quantile([len(row.prompt_ids) for row in production], 95) if production else None,
            quarantined=dict(splits.reasons.most_common()),
            config=(self.folder / "config.yaml").read_text(encoding="utf-8"),
            base=self.model.base,
            date=settings.date,
        )
        write_run_report(run, self.folder)

    def _announce(self, sample: list[Row], evaluations: int) -> None:
        """Print how long the baselines will take, estimated from a few rows, and how to skip them."""
        if self.trainer.fast_dev_run or len(sample) <= TIMED_ROWS or self._stored(sample):
            return
        started = time.monotonic()
        self._test(None, sample[:TIMED_ROWS], Decoding(max_new_tokens=self._limit, logged=False))
        minutes = (time.monotonic() - started) / TIMED_ROWS * len(sample) * evaluations / 60
        skip = "" if evaluations == 1 else "; --baselines '[]' measures the plain base alone"
        if self._writes:
            print(
                f"baselines: {evaluations} evaluations of {len(sample)} of {len(self._rows['test'])} test rows, at "
                f"most about {max(1, round(minutes))} min{skip}",
                flush=True,
            )

    def _stored(self, rows: list[Row], constrained: bool = False) -> dict[str, Any] | None:
        """What was measured before for the same base, rows, format and settings."""
        # On several machines some might find it and others not, and these would wait for those without end.
        if self.trainer.num_nodes > 1 or self.trainer.fast_dev_run:
            return None
        return load_baseline(self._key(rows, constrained))

    def _key(self, rows: list[Row], constrained: bool) -> str:
        model, trainer = self.model, self.trainer
        settings = {
            "precision": trainer.precision,
            "quantize": model.quantize,
            "constrained": model.constrained or constrained,
            "max_new_tokens": self._limit,
            "batches": trainer.limit_test_batches,
        }
        return baseline_key(model.base, rows, settings, model.format)

    @property
    def _limit(self) -> int:
        """Tokens that a baseline may decode: an untuned base often does not stop."""
        return min(self.model.max_new_tokens, LONGEST * max(len(row.target_ids) for row in self._rows["test"]))

    def _baseline(self, name: str, rows: list[Row], result: dict[str, Any], constrained: bool = False) -> list[Outcome]:
        """Outcomes of the base on the rows, from the cache if it has them; the figures go into `result`."""
        stored = self._stored(rows, constrained)
        if stored is None:
            # One point of the curves belongs to step 0: the base as it will be trained.
            self._test(VIEWS[name], rows, Decoding(constrained, self._limit, logged=name == "before"))
            values, counts = results(self.model)
            # Figures of a class whose code may change are computed anew each time.
            values = {name: value for name, value in values.items() if not name.startswith("own/")}
            stored = {"values": values, "counts": counts, "outcomes": self._outcomes.outcomes}
            if self._writes:
                store_baseline(self._key(rows, constrained), values, counts, self._outcomes.outcomes)
        outcomes = stored["outcomes"]
        own = self.model.scores.own.alone([one.answer for one in outcomes], [one.target for one in outcomes])
        result[name], result["counts"][name] = stored["values"] | own, stored["counts"]
        self._keep(name, outcomes)
        return outcomes

    def _test(self, name: str | None, rows: list[Row], decoding: Decoding) -> None:
        if self._writes and name:  # a bar shows nothing in a log file
            print(f"measuring: {name}, {len(rows)} rows", flush=True)
        self.trainer.test(self.model, self.datamodule.evaluation_loader(rows, decoding), verbose=False)

    def _keep(self, name: str, outcomes: list[Outcome]) -> None:
        self._kept[name] = outcomes
        if self._writes:
            write_outcomes(self.folder / "outcomes" / f"{name}.jsonl", outcomes)
