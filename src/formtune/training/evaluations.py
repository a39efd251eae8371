"""The evaluations of one `fit` on the test rows: prompted base, tuned model, longer inputs, and the report on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from formtune.base.folder import context_length
from formtune.base.row import Row, quantile
from formtune.data.datamodule import FormatDataModule
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
from formtune.model.constrained import Grammar
from formtune.training.test_outcomes import Outcomes

Baseline = Literal["few_shot", "constrained"]
Counts = dict[str, tuple[int, int]]


def results(model: FormatModule) -> tuple[dict[str, float], Counts]:
    """The last evaluation's figures by the names they have in validation, and the counts behind each rate."""
    plain = {name.removeprefix("test/"): value for name, value in model.evaluation.items()}
    return {name if "/" in name else f"val/{name}": value for name, value in plain.items()}, model.counts


class Evaluations:
    """Evaluates on the test rows and keeps each row's outcome.

    Args:
        trainer: The trainer of the run.
        model: The model, adapters at zero until it is trained.
        datamodule: The rows.
        outcomes: The callback that collects outcomes.
        folder: Folder of the run.
    """

    def __init__(
        self, trainer: Any, model: FormatModule, datamodule: FormatDataModule, outcomes: Outcomes, folder: Path
    ) -> None:
        self.trainer, self.model, self.datamodule, self.folder = trainer, model, datamodule, folder
        self._callback = outcomes
        self._kept: dict[str, list[Outcome]] = {}
        self._grammar: Grammar | None = None  # where the base is measured under it, the tuned model is too
        self._context = context_length(model.base) or 10**9
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        datamodule.trainer = trainer
        datamodule.setup("test")
        assert datamodule.splits is not None
        self._rows = datamodule.splits.rows

    def baselines(self, kinds: Sequence[Baseline]) -> dict[str, Any]:
        """Figures of the base: plain (`before`), and those of `few_shot` and `before_constrained` that are asked for.

        Args:
            kinds: What to measure beside the plain base.
        """
        found: dict[str, Any] = {"counts": {}}
        under = " and under the grammar" if self.model.constrained else ""
        plain = f"without examples{under}"
        prompts = {plain: self._rows["test"]}
        outcomes = {plain: self._baseline("before", self._rows["test"], found)}
        if "few_shot" in kinds:
            chosen = choose_shots(self._rows["train"], SHOTS, self.model.format)
            renderer = self.datamodule.preparation.renderer
            few, count = few_shot_rows(self._rows["test"], chosen, renderer, self.model.format, self._context)
            if count:
                name = f"with {count} example{'s' if count > 1 else ''} in the prompt{under}"
                prompts[name], outcomes[name] = few, self._baseline("few_shot", few, found)
                found["shots"] = [row.where for row in chosen[:count]]
            elif self._writes:
                print("not measured with examples in the prompt: none fits beside the longest test row")
        constrained = None
        if "constrained" in kinds and not self.model.constrained:  # else all of them are
            try:
                self._grammar = Grammar(self.model.format, self.datamodule.preparation.renderer)
            except UserError as error:
                found["no_grammar"] = str(error).removeprefix("model.constrained: ")
            else:
                rows = prompts[best_prompt(outcomes)]
                constrained = self._baseline("before_constrained", rows, found, self._grammar)
        if self._writes:
            found["constant"] = constant_answer(self._rows["train"], self._rows["test"], self.model.format)
            found["prompting"] = prompting_verdict(outcomes, constrained)
            print(found["prompting"])
            if "no_grammar" in found:
                print(f"what a grammar would reach is not measured: {found['no_grammar']}")
        return found

    def tuned(self, result: dict[str, Any]) -> None:
        """Put figures of the model as it is now into the result, under the grammar too where the base was measured so.

        Args:
            result: What `baselines` found.
        """
        for name, grammar in (("after", None), ("after_constrained", self._grammar)):
            if name == "after" or grammar:
                self._test(VIEWS[name], None, logs=name == "after", grammar=grammar)
                self._save(name, self._callback.outcomes)
                result[name], result["counts"][name] = results(self.model)

    def probe(self) -> list[dict[str, Any]]:
        """Format compliance of the model on test rows that were made longer."""
        production = self.datamodule.preparation.production_rows
        lengths = probe_lengths(
            [len(row.prompt) for row in self._rows["train"]],
            [len(row.prompt) for row in production],
            self._context - max(len(row.target) for row in self._rows["test"]),
        )
        texts = [row.source for row in production or self._rows["train"]]
        renderer = self.datamodule.preparation.renderer
        longer = probe_rows(self._rows["test"], texts, lengths, renderer, self.model.format)
        rows = [row for part in longer.values() for row in part]
        if not rows or self.trainer.fast_dev_run:
            return []
        numbered = [replace(row, number=number) for number, row in enumerate(rows)]
        self._test("tuned, on inputs made longer", numbered, logs=False)
        exact = [outcome.exact for outcome in self._callback.outcomes]
        if len(exact) < len(rows):  # the user limits the test
            return []
        found = []
        for name, part in longer.items():
            mine, exact = exact[: len(part)], exact[len(part) :]
            found.append({"name": name, "tokens": lengths[name], "rows": len(mine), "exact": sum(mine)})
        return found

    def report(self, result: dict[str, Any]) -> None:
        """Write the run's page and the adapter's card.

        Args:
            result: What `metrics.json` holds.
        """
        splits, production = self.datamodule.splits, self.datamodule.preparation.production_rows
        assert splits is not None
        run = Run(
            name=f"{self.folder.parent.name}/{self.folder.name}",
            result=result,
            outcomes=self._kept,
            contract=self.model.format,
            longest=max(len(row.prompt) for row in self._rows["train"]),
            production_p95=quantile([len(row.prompt) for row in production], 95) if production else None,
            set_aside=dict(splits.reasons.most_common()),
            config=(self.folder / "config.yaml").read_text(encoding="utf-8"),
            base=self.model.base,
            date=self.datamodule.preparation.date,
        )
        write_run_report(run, self.folder)

    def _baseline(
        self, name: str, rows: list[Row], found: dict[str, Any], grammar: Grammar | None = None
    ) -> list[Outcome]:
        """Outcomes of the base on the rows, from the cache where it has them; its figures go into `found`."""
        model, trainer = self.model, self.trainer
        settings = {
            "precision": trainer.precision,
            "quantize": model.quantize,
            "constrained": model.constrained or grammar is not None,
            "max_new_tokens": model.max_new_tokens,
            "batches": trainer.limit_test_batches,
        }
        key = baseline_key(model.base, rows, settings, model.format)
        # On several machines some might find it and others not, and these would wait for those without end.
        stored = load_baseline(key) if trainer.num_nodes == 1 and not trainer.fast_dev_run else None
        if stored is None:
            # One point of the curves belongs to step 0: the base as it will be trained, without examples.
            self._test(VIEWS[name], rows, logs=name == "before", grammar=grammar)
            values, counts = results(model)
            # Figures of a class whose code may change are worked out anew each time.
            values = {name: value for name, value in values.items() if not name.startswith("own/")}
            stored = {"values": values, "counts": counts, "outcomes": self._callback.outcomes}
            if self._writes:
                store_baseline(key, values, counts, self._callback.outcomes)
        said = [one.answer for one in stored["outcomes"]], [one.target for one in stored["outcomes"]]
        found[name], found["counts"][name] = stored["values"] | model.own.alone(*said), stored["counts"]
        self._save(name, stored["outcomes"])
        return stored["outcomes"]

    def _test(self, name: str, rows: list[Row] | None, logs: bool, grammar: Grammar | None = None) -> None:
        if self._writes:  # a bar shows nothing in a log file
            print(f"measuring: {name}, {len(rows or self._rows['test'])} rows", flush=True)
        self.datamodule.test_rows, self.model.logs_evaluations = rows, logs
        if not self.model.constrained:  # else the model has a grammar of its own, always
            self.model.grammar = grammar
        self.trainer.test(self.model, self.datamodule, verbose=False)
        self.datamodule.test_rows, self.model.logs_evaluations = None, True
        if not self.model.constrained:
            self.model.grammar = None

    def _save(self, name: str, outcomes: list[Outcome]) -> None:
        self._kept[name] = outcomes
        if self._writes:
            write_outcomes(self.folder / "outcomes" / f"{name}.jsonl", outcomes)
