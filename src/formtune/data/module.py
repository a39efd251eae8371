"""The LightningDataModule: one batch is the rows of one optimizer step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader, Sampler

from formtune.data.cleaning import Step, repair
from formtune.data.encoded import Splits
from formtune.data.progress import shown
from formtune.data.sources import Columns, Source
from formtune.data.splits import BAD_REASONS, Splitter
from formtune.errors import UserError
from formtune.formats import Format
from formtune.rendering import Renderer, Row, context_length

FEW_ROWS = 500  # below this, fine-tuning mostly learns the examples; the guide's lower bound
EVALUATION_ROWS = 256  # rows handed over at once; the model splits them further by tokens


class Order(Sampler[int]):
    """A permutation of the rows that is a function of seed and epoch alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


class FormatDataModule(L.LightningDataModule):
    """Reads rows, cleans and judges them, splits them by hash and encodes them with a proven mask.

    Args:
        format: The contract that every answer must keep, the training answers first.
        train: File (.jsonl, .csv, .parquet), data set folder, hub id, or a Source.
        validation: The same for validation, or the share of train's inputs to split off.
        test: The same for the final test, or the share of train's inputs to split off.
        prompts: Inputs for `predict`: the same kinds as train, no answers needed.
        tokenizer: Model folder or hub id of the tokenizer (follows `model.base`).
        system: System prompt for rows that have none; `{schema}` in it stands for the contract's JSON Schema.
        columns: Which columns hold the conversation.
        clean: Repairs to run on inputs, here and in `predict`.
        bad_rows: What to do when answers break the contract or rows are too long: refuse to train, or drop and count.
        rows_per_step: Rows of one optimizer step, over all devices.
        max_length: Tokens that prompt and answer may have together; longer rows are bad rows, they are never cut.
        max_new_tokens: Tokens that an answer may have (follows `model.max_new_tokens`).
    """

    def __init__(
        self,
        format: Format,
        train: str | Source | None = None,
        validation: ClosedUnitInterval | str | Source = 0.1,
        test: ClosedUnitInterval | str | Source = 0.1,
        prompts: str | Source | None = None,
        tokenizer: str = "",
        system: str | None = None,
        columns: Columns | None = None,
        clean: list[Step] = ["unicode", "control", "edges"],  # noqa: B006 (jsonargparse shows it in --help)
        bad_rows: Literal["refuse", "drop"] = "refuse",
        rows_per_step: PositiveInt = 16,
        max_length: PositiveInt = 1024,
        max_new_tokens: PositiveInt = 256,
    ) -> None:
        super().__init__()
        self.format, self.prompts, self.system = format, prompts, system
        self.sources = (train, validation, test)
        self.base, self.columns, self.clean = tokenizer, columns or Columns(), clean
        self.bad_rows, self.rows_per_step = bad_rows, rows_per_step
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.splits: Splits | None = None
        self.prompt_rows: list[Row] = []
        if system and "{schema}" in system:
            schema = format.to_dict()["init_args"].get("schema")
            if schema is None:
                raise UserError("data.system: {schema} needs a JsonSchema as data.format")
            self.system = system.replace("{schema}", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
        if sum(share for share in (validation, test) if isinstance(share, float)) >= 1:
            raise UserError("data.validation, data.test: the two shares leave no rows to train on")

    def setup(self, stage: str) -> None:
        """Prepare the splits (fit, validate, test) or the prompts (predict), once.

        Raises:
            UserError: A file, a row or all rows cannot be used; names the file and line, or the reasons with counts.
        """
        if stage == "predict":
            self._setup_prompts()
        elif self.splits is None:
            train, validation, test = self.sources
            if train is None:
                raise UserError("data.train: name a file to train on")
            with self._first_process_first():
                self.splits = self._splitter().split(train, validation, test)
            if self.trainer is not None and self.trainer.loggers:
                self._write_quarantine(Path(self.trainer.default_root_dir) / "quarantine.jsonl")
            self._check(self.splits)

    def train_dataloader(self) -> DataLoader:
        rows: Any = self._rows("train")
        order = Order(len(rows), int(os.environ.get("PL_GLOBAL_SEED", 0)))
        steps = BatchSampler(order, self.rows_per_step, drop_last=False)
        return DataLoader(rows, batch_sampler=steps, collate_fn=self._deal())

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self._rows("validation"))

    def test_dataloader(self) -> DataLoader:
        return self._evaluation(self._rows("test"))

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation(self.prompt_rows)

    def transfer_batch_to_device(self, batch: list[Row], device: torch.device, dataloader_idx: int) -> list[Row]:
        return batch  # rows are plain Python: the model makes the tensors of each pass

    def _rows(self, split: str) -> list[Row]:
        assert self.splits is not None, "setup() comes first"
        return self.splits.rows[split]

    def _evaluation(self, rows: Any) -> DataLoader:
        # In the order of the file: a limited evaluation then sees rows of all lengths. The model sorts within a batch.
        return DataLoader(rows, batch_size=EVALUATION_ROWS, collate_fn=self._deal())

    def _deal(self) -> Callable[[list[Row]], list[Row]]:
        """Each process takes its share of the same global rows, so that the number of processes changes no step."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return lambda rows: rows[rank::world]

    @contextlib.contextmanager
    def _first_process_first(self) -> Iterator[None]:
        """The others wait for it and find its rows in the cache; where they do not, they work them out themselves."""
        if self.trainer is None:
            yield
            return
        strategy = self.trainer.strategy
        if not self.trainer.is_global_zero:
            strategy.barrier()
        try:
            yield
        finally:  # after an error too: the others then stop with the same message
            if self.trainer.is_global_zero:
                strategy.barrier()

    def _splitter(self) -> Splitter:
        limit = min(self.max_length, context_length(self.base) or self.max_length)
        return Splitter(
            self.format, Renderer.load(self.base), self.columns, self.system, self.clean, limit, self.max_new_tokens
        )

    def _setup_prompts(self) -> None:
        if self.prompts is None:
            raise UserError("data.prompts: name a file of prompts to answer")
        splitter = self._splitter()
        examples = splitter.examples(self.prompts, gold=False)
        rows = splitter.renderer.encode([(repair(e.messages, self.clean), e.where) for e in examples])
        self.prompt_rows = []
        for example, row in zip(examples, shown(rows, len(examples), "encoding"), strict=True):
            if not isinstance(row, Row):
                raise UserError(f"{example.where}: {row}; mend or remove the prompt")
            self.prompt_rows.append(row)
        if not self.prompt_rows:
            raise UserError(f"data.prompts: {self.prompts} holds no prompt")
        for row in self.prompt_rows:
            if len(row) >= splitter.max_length:
                raise UserError(
                    f"{row.where}: the prompt has {len(row)} tokens, with an answer more than the limit of "
                    f"{splitter.max_length}; raise data.max_length (the base's context bounds it) or shorten the prompt"
                )

    def _check(self, splits: Splits) -> None:
        bad = [row for row in splits.quarantine if row.reason in BAD_REASONS]
        if bad and self.bad_rows == "refuse":
            raise UserError(
                f"{bad[0].where}: {bad[0].detail} ({len(bad)} such rows); mend them, or set data.bad_rows: drop"
            )
        empty = [name for name, rows in splits.rows.items() if not rows]
        if empty:
            reasons = splits.set_aside or "nothing set aside"
            raise UserError(f"data.{empty[0]}: no row is left to use ({sum(splits.read.values())} read; {reasons})")

    @rank_zero_only
    def _write_quarantine(self, path: Path) -> None:
        assert self.splits is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for row in self.splits.quarantine:
                record = {"where": row.where, "reason": row.reason, "detail": row.detail, "messages": row.messages}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
