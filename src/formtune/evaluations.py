"""The evaluations of one `fit` on the test rows: prompted base, tuned model, longer inputs, and the report on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from formtune.callbacks import Outcomes
from formtune.data.encoded import quantile
from formtune.data.module import FormatDataModule
from formtune.evaluation.baseline import (
    baseline_key,
    choose_shots,
    few_shot_rows,
    load_baseline,
    prompting_verdict,
    store_baseline,
)
from formtune.evaluation.outcomes import Outcome, write_outcomes
from formtune.evaluation.probe import probe_lengths, probe_rows
from formtune.evaluation.report import Run, write_run_report
from formtune.model import FormatModule
from formtune.rendering import Renderer, Row, context_length

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
        self._context = context_length(model.base) or 10**9
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        datamodule.trainer = trainer
        datamodule.setup("test")
        assert datamodule.splits is not None
        self._rows = datamodule.splits.rows

    def baselines(self, shots: int) -> dict[str, Any]:
        """Figures of the base, plain (`before`) and with up to `shots` training rows in its prompt (`few_shot`)."""
        found: dict[str, Any] = {"counts": {}}
        test, contract = self._rows["test"], self.model.format
        outcomes = {"without examples": self._baseline("before", test, found)}
        if shots:
            chosen = choose_shots(self._rows["train"], shots, contract)
            few, count = few_shot_rows(test, chosen, Renderer.load(self.model.base), contract, self._context)
            if count:
                name = f"with {count} example{'s' if count > 1 else ''} in the prompt"
                outcomes[name] = self._baseline("few_shot", few, found)
                found["shots"] = [row.where for row in chosen[:count]]
        if self._writes:
            found["prompting"] = prompting_verdict(outcomes)
            print(found["prompting"])
        return found

    def tuned(self) -> tuple[dict[str, float], Counts]:
        """Figures of the model as it is now."""
        self._test(None, logs=True)
        self._save("after", self._callback.outcomes)
        return results(self.model)

    def probe(self) -> list[dict[str, Any]]:
        """Format compliance of the model on test rows that were made longer."""
        production = self.datamodule.preparation.production_rows
        lengths = probe_lengths(
            [len(row.prompt) for row in self._rows["train"]],
            [len(row.prompt) for row in production],
            self._context - max(len(row.target) for row in self._rows["test"]),
        )
        texts = [row.source for row in production or self._rows["train"]]
        renderer = Renderer.load(self.model.base)
        longer = probe_rows(self._rows["test"], texts, lengths, renderer, self.model.format)
        rows = [row for part in longer.values() for row in part]
        if not rows or self.trainer.fast_dev_run:
            return []
        self._test([replace(row, number=number) for number, row in enumerate(rows)], logs=False)
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
            result=result,
            outcomes=self._kept,
            contract=self.model.format,
            longest=max(len(row.prompt) for row in self._rows["train"]),
            production_p95=quantile([len(row.prompt) for row in production], 95) if production else None,
            set_aside=dict(splits.reasons.most_common()),
            config=(self.folder / "config.yaml").read_text(encoding="utf-8"),
            base=self.model.base,
        )
        write_run_report(run, self.folder)

    def _baseline(self, name: str, rows: list[Row], found: dict[str, Any]) -> list[Outcome]:
        """Outcomes of the base on the rows, from the cache where it has them; its figures go into `found`."""
        model, trainer = self.model, self.trainer
        settings = {
            "precision": trainer.precision,
            "quantize": model.quantize,
            "constrained": model.constrained,
            "max_new_tokens": model.max_new_tokens,
            "batches": trainer.limit_test_batches,
        }
        key = baseline_key(model.base, rows, settings, model.format)
        # On several machines some might find it and others not, and these would wait for those without end.
        stored = load_baseline(key) if trainer.num_nodes == 1 and not trainer.fast_dev_run else None
        if stored is None:
            # One point of the curves belongs to step 0: the base as it will be trained, without examples.
            self._test(rows, logs=name == "before")
            values, counts = results(model)
            stored = {"values": values, "counts": counts, "outcomes": self._callback.outcomes}
            if self._writes:
                store_baseline(key, values, counts, self._callback.outcomes)
        found[name], found["counts"][name] = stored["values"], stored["counts"]
        self._save(name, stored["outcomes"])
        return stored["outcomes"]

    def _test(self, rows: list[Row] | None, logs: bool) -> None:
        self.datamodule.test_rows, self.model.logs_evaluations = rows, logs
        self.trainer.test(self.model, self.datamodule, verbose=False)
        self.datamodule.test_rows, self.model.logs_evaluations = None, True

    def _save(self, name: str, outcomes: list[Outcome]) -> None:
        self._kept[name] = outcomes
        if self._writes:
            write_outcomes(self.folder / "outcomes" / f"{name}.jsonl", outcomes)
