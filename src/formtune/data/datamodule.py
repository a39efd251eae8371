"""The LightningDataModule: one batch is the rows of one optimizer step."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader, Sampler

from formtune.base.row import Row
from formtune.data.encoded import Splits
from formtune.data.preparation import Preparation
from formtune.errors import UserError
from formtune.files import write_lines

EVALUATION_ROWS = 256  # rows handed over at once; the model splits them further by tokens


class Order(Sampler[int]):
    """A permutation of the rows that is a function of seed and epoch alone.

    Args:
        rows: How many there are.
        seed: Of the run.
        done: Tells how many rows of the epoch a run that goes on has seen.
    """

    def __init__(self, rows: int, seed: int, done: Callable[[], int] = lambda: 0) -> None:
        self.rows, self.seed, self.epoch, self._done = rows, seed, 0, done

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        # Asked at the first row and not before: Lightning makes the iterator first and then reads the checkpoint.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()[self._done() :]


class StepLoader(DataLoader):
    """Batches of one optimizer step each. Its place in the epoch is the trainer's own count, so its state is empty."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class FormatDataModule(L.LightningDataModule):
    """The rows that a `Preparation` makes, as batches of optimizer steps.

    Args:
        rows_per_step: Rows of one optimizer step, over all devices.
        preparation: What `Preparation` takes.
    """

    def __init__(self, rows_per_step: PositiveInt = 16, **preparation: Any) -> None:
        super().__init__()
        self.rows_per_step = rows_per_step
        self.preparation = Preparation(**preparation)
        self.splits: Splits | None = None
        self.test_rows: list[Row] | None = None  # in place of the test split, such as its rows with examples in front
        self.prompt_rows: list[Row] = []

    def setup(self, stage: str) -> None:
        """Prepare the splits (fit, validate, test) or the prompts (predict), once.

        Raises:
            UserError: A file, a row or all rows cannot be used; names the file and line, or the reasons with counts.
        """
        if stage == "predict":
            self.prompt_rows = self.preparation.encode_prompts()
        elif self.splits is None:
            with self._first_process_first():
                self.splits = self.preparation.split()
            if self.trainer is not None and self.trainer.loggers:
                self._write_quarantine(Path(self.trainer.default_root_dir) / "quarantine.jsonl")
            self.preparation.check(self.splits)

    def train_dataloader(self) -> DataLoader:
        rows: Any = self._rows("train")
        order = Order(len(rows), int(os.environ.get("PL_GLOBAL_SEED", 0)), self._done)
        steps = BatchSampler(order, self.rows_per_step, drop_last=False)
        return StepLoader(rows, batch_sampler=steps, collate_fn=self._deal())

    def _done(self) -> int:
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        return steps * self.rows_per_step

    def state_dict(self) -> dict[str, str]:
        return {"rows": self._rows_hash}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        if self.trainer is not None and self.trainer.state.fn == "fit" and state_dict["rows"] != self._rows_hash:
            raise UserError(
                "data: the training or validation rows are others than when this run began; begin a new run"
            )

    @functools.cached_property
    def _rows_hash(self) -> str:
        """Of what is trained on and chosen by, whatever file it came from."""
        hashed = hashlib.blake2b(digest_size=16)
        for split in ("train", "validation"):
            for row in self._rows(split):
                hashed.update(array("i", [*row.prompt, -1, *row.target, -2]))
            hashed.update(split.encode())
        return hashed.hexdigest()

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self._rows("validation"))

    def test_dataloader(self) -> DataLoader:
        return self._evaluation(self._rows("test") if self.test_rows is None else self.test_rows)

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation(self.prompt_rows)

    def training_sample(self) -> list[Row]:
        """This process's share of a fixed sample of training rows: as many as validation sees, the same in every run.

        Drawn by a generator of its own, and not evenly spaced: files made from templates repeat every so many rows.
        """
        assert self.trainer is not None
        rows, validated = self._rows("train"), int(sum(self.trainer.num_val_batches)) * EVALUATION_ROWS
        count = min(len(rows), len(self._rows("validation")), validated)
        return self._deal()([rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))])

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

    @rank_zero_only
    def _write_quarantine(self, path: Path) -> None:
        assert self.splits is not None
        write_lines(path, map(asdict, self.splits.quarantine))
