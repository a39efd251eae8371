"""The evaluations of a `formtune train` on the test rows: baselines, tuned model, longer inputs."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only

from formtune.base.row import Row
from formtune.data.datamodule import FormatDataModule
from formtune.data.preparation import production_rows, sample
from formtune.errors import UserError
from formtune.evaluation import baselines as prompting
from formtune.evaluation.outcomes import EVALUATIONS, Outcome, rate, write_outcomes
from formtune.evaluation.probe import MAX_RATIO, probe_lengths, probe_rows
from formtune.files import optional, read_entry, write_entry
from formtune.model import FormatModule
from formtune.model.micro_batches import Decoding

Baseline = Literal["few_shot", "constrained"]
LENGTH_FACTOR, MIN_TOKENS = 2, 16  # tokens that a baseline may decode: a multiple of the longest target's, at least 16

_print = rank_zero_only(functools.partial(print, flush=True))


class Evaluator:
    """Evaluates on the test rows; keeps the outcome of each row, and the content of `metrics.json` in `result`."""

    def __init__(self, trainer: Any, model: FormatModule, datamodule: FormatDataModule, folder: Path) -> None:
        assert datamodule.splits is not None, "prepare() comes first"
        self.trainer, self.model, self.datamodule, self.folder = trainer, model, datamodule, folder
        self.splits, self.settings = datamodule.splits, datamodule.settings
        # Each row once, whatever its weight: no example is in a prompt twice.
        self.train_rows = list({id(row): row for row in datamodule.rows["train"]}.values())
        self.test_rows = datamodule.rows["test"]
        self.result: dict[str, Any] = {"counts": {}}
        self.outcomes: dict[str, list[Outcome]] = {}
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        self._longest = max(len(row.target_ids) for row in self.test_rows)
        self._seconds = 0.0  # time of the last baseline; 0 from the cache

    def baselines(self, kinds: Sequence[Baseline], max_rows: int) -> None:
        """Measure the zero-shot base and the baselines in `kinds`, on at most `max_rows` test rows."""
        test, format, renderer, result = self.test_rows, self.model.format, self.settings.renderer, self.result
        sampled = sample(test, max_rows)
        prompts, outcomes = {"zero-shot": sampled}, {"zero-shot": self._baseline("before", sampled)}
        if self._seconds and (more := len(kinds) + bool(self.model.adapter)):
            minutes = max(1, round(more * self._seconds / 60))
            rest = f"{more} more on {len(sampled)} of {len(test)} test rows, about {minutes} min"
            _print(f"baselines: {rest}; --baselines '[]' measures only the zero-shot base")
        if "few_shot" in kinds:
            shots = prompting.shots_by_schema(self.train_rows, sampled, format)
            rows, count = prompting.few_shot_rows(sampled, shots, renderer, self.model.context)
            if count:
                name = f"{count}-shot"
                prompts[name], outcomes[name] = rows, self._baseline("few_shot", rows)
                result["shots"] = [row.where for rows in shots.values() for row in rows[:count]]
            else:
                _print("skipped few-shot: no example fits into the context with the longest test row")
        constrained = None
        if "constrained" in kinds and not self.model.constrained:  # else every evaluation is constrained
            try:
                kind = optional("constrained.decoder", "Grammar", "model.constrained")
                grammar = kind(format, renderer, self.splits.orders)
                for row in test:
                    grammar.matcher(row)
            except UserError as error:
                result["no_grammar"] = str(error).removeprefix("model.constrained: ")
                _print(f"skipped constrained decoding: {result['no_grammar']}")
            else:
                rows = prompts[prompting.best_prompt(outcomes)]
                constrained = self._baseline("before_constrained", rows, constrained=True)
        if self.model.adapter:
            self._baseline("start", sampled)
        if self._writes:
            result["constant"] = prompting.constant_answer(self.train_rows, test, format)
            result["prompting"] = prompting.prompting_verdict(outcomes, constrained)
            print(result["prompting"])

    def tuned(self) -> None:
        """Measure the tuned model, with constrained decoding too if the base was measured so."""
        decodings = {"after": Decoding()}
        if "before_constrained" in self.result:
            decodings["after_constrained"] = Decoding(constrained=True, logged=False)
        for name, decoding in decodings.items():
            outcomes = self._test(EVALUATIONS[name], self.test_rows, decoding)
            self._store(name, outcomes, self.model.evaluation, self.model.counts)
        rows = self.datamodule.rows["validation"]  # answered again: checkpoints contain verdicts, not confidences
        validation = self._test("tuned, on the validation rows", rows, Decoding(logged=False))
        if self._writes:
            write_outcomes(self.folder / "outcomes" / "validation.jsonl", validation)
            summary = optional("report.selective", "summary")
            if summary and (confidence := summary(validation, self.outcomes["after"])):
                self.result["confidence"] = confidence

    def probe(self) -> list[dict[str, Any]]:
        """Valid format on extended test rows, up to production's P99 and beyond the training rows."""
        production = production_rows(self.settings)
        train, longer = ([len(row.prompt_ids) for row in rows] for rows in (self.train_rows, production))
        lengths = probe_lengths(train, longer, int((self.model.context - self._longest) / MAX_RATIO))
        texts = [row.input for row in production or self.train_rows]
        probes = []
        for name, rows in probe_rows(self.test_rows, texts, lengths, self.settings.renderer).items():
            outcomes = self._test(f"tuned, inputs as long as {name}", rows, Decoding(logged=False))
            exact, count = rate(outcomes, "exact")
            probes.append({"name": name, "tokens": lengths[name], "rows": count, "exact": exact})
        return probes

    def _baseline(self, name: str, rows: list[Row], constrained: bool = False) -> list[Outcome]:
        """Outcomes of the base or of `model.adapter` on the rows, from the cache if it has them."""
        model, trainer, started = self.model, self.trainer, time.monotonic()
        # An untuned base often does not stop.
        limit = untuned_limit(model, self._longest)
        settings = {
            "precision": trainer.precision,
            "quantize": model.quantize,
            "constrained": [self.splits.orders] if model.constrained or constrained else None,
            "max_new_tokens": limit,
            "batches": trainer.limit_test_batches,
            "adapter": model.adapter.hash if model.adapter and name == "start" else None,
        }
        path = prompting.cache_entry(model.base, rows, settings, model.format)
        # Not read with custom code, which may have changed since, or on several processes: if another run writes the
        # entry meanwhile, only some of them would find it, and all would wait for each other forever.
        custom = bool(model.scores.custom) or model.format.is_custom
        must_measure = custom or trainer.world_size > 1 or trainer.fast_dev_run
        entry = None if must_measure else read_entry(path)
        if entry:
            values, counts, records = entry
            values = {name: values[name] for name in counts}  # without another run's custom metrics
            outcomes = [Outcome(*record) for record in records]
        else:
            # Step 0 of the curves has one point: the model as it will be trained.
            first, untuned = ("start", name != "start") if model.adapter else ("before", False)
            outcomes = self._test(EVALUATIONS[name], rows, Decoding(constrained, limit, name == first, untuned))
            values, counts = model.evaluation, model.counts
            if self._writes:
                write_entry(path, [values, counts, outcomes], prompting.MAX_ENTRIES)
        self._seconds = 0.0 if entry else time.monotonic() - started
        self._store(name, outcomes, values, counts)
        return outcomes

    def _test(self, name: str, rows: list[Row], decoding: Decoding) -> list[Outcome]:
        _print(f"evaluating: {name}, {len(rows)} rows")  # a bar shows nothing in a log file
        self.trainer.test(self.model, self.datamodule.evaluation_loader(rows, decoding), verbose=False)
        return self.model.outcomes

    def _store(self, name: str, outcomes: list[Outcome], values: dict[str, float], counts: dict[str, Any]) -> None:
        self.outcomes[name], self.result[name], self.result["counts"][name] = outcomes, values, counts
        if self._writes:
            write_outcomes(self.folder / "outcomes" / f"{name}.jsonl", outcomes)


def untuned_limit(model: Any, longest: int) -> int:
    """Tokens that an untuned base may decode, if the longest target has `longest` tokens."""
    return min(model.max_new_tokens, max(LENGTH_FACTOR * longest, MIN_TOKENS))
