"""The LightningDataModule: a training batch has the rows of one optimizer step."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse.typing import PositiveInt
from torch.utils.data import BatchSampler, DataLoader, Sampler

from formtune.base.row import Row
from formtune.data.blockers import check_rows
from formtune.data.encoded import Splits, content_hash
from formtune.data.preparation import load_splits, prompt_rows, sample
from formtune.data.settings import DataSettings
from formtune.errors import UserError
from formtune.files import write_lines

EVALUATION_ROWS = 256  # of a batch; the model splits it further by tokens


class ResumableSampler(Sampler[int]):
    """A permutation of the rows that depends on seed and epoch alone; a resumed run continues after `seen()` rows."""

    def __init__(self, rows: int, seed: int, seen: Callable[[], int] = lambda: 0, fixed: bool = False) -> None:
        self.rows, self.seed, self.epoch, self._seen = rows, seed, 0, seen
        self.fixed = fixed  # whether all epochs use the order of the first

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        # `_seen` is called at the first row: Lightning creates the iterator before it reads the checkpoint.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()[self._seen() :]


class FormatDataModule(L.LightningDataModule):
    """Prepared rows as batches; a training batch is one optimizer step.

    Args:
        rows_per_step: Rows of one optimizer step, over all devices.
        settings: Arguments of `DataSettings`.
    """

    def __init__(self, rows_per_step: PositiveInt = 16, **settings: Any) -> None:
        super().__init__()
        self.rows_per_step = rows_per_step
        self.settings = DataSettings(**settings)
        self.splits: Splits | None = None
        self.rows: dict[str, list[Row]] = {}  # used rows by split
        self.prompt_rows: list[Row] = []

    def prepare_data(self) -> None:
        """Prepare and cache the splits on one process, before `setup` on all."""
        if self.trainer is None or self.trainer.state.fn != "predict":
            self.setup("fit")

    def setup(self, stage: str) -> None:
        """Read the splits (fit, validate, test) or the prompts (predict), once."""
        if stage == "predict":
            self.prompt_rows = self.prompt_rows or prompt_rows(self.settings)
            return
        trainer: Any = self.trainer
        if trainer and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError("Trainer(use_distributed_sampler=True) would split the rows a second time; set it to False")
        if self.splits is None:
            splits = load_splits(self.settings)
            if trainer is not None and trainer.loggers and trainer.is_global_zero and not trainer.fast_dev_run:
                write_lines(Path(trainer.default_root_dir) / "quarantine.jsonl", map(asdict, splits.quarantine))
            check_rows(self.settings, splits)
            self.splits, self.rows = splits, splits.rows | {"train": splits.training}
            for name in ("validation", "test"):
                self.rows[name] = sample(splits.rows[name], self.settings.max_evaluation_rows)

    def train_dataloader(self) -> DataLoader:
        rows: Any = self.rows["train"]
        trainer: Any = self.trainer
        overfit = bool(trainer and trainer.overfit_batches)
        order = ResumableSampler(len(rows), int(os.environ.get("PL_GLOBAL_SEED", 0)), self._rows_seen, overfit)
        steps = BatchSampler(order, self.rows_per_step, drop_last=False)
        return DataLoader(rows, batch_sampler=steps, collate_fn=self._collate)

    def _rows_seen(self) -> int:
        return self.rows_per_step * self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

    def state_dict(self) -> dict[str, str]:
        return {"rows": self._content_hash}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        if self.trainer is not None and self.trainer.state.fn == "fit" and state_dict["rows"] != self._content_hash:
            raise UserError("data: the training or validation rows have changed since this run began; start a new run")

    @functools.cached_property
    def _content_hash(self) -> str:
        return content_hash({split: self.rows[split] for split in ("train", "validation")})

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.rows["validation"])

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.rows["test"])

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader(self.prompt_rows)

    def evaluation_loader(self, rows: Sequence[Row], decoding: Any = None) -> DataLoader:
        """Batches of any rows for `trainer.test`; `decoding` is passed to the model, None for its own settings."""
        collate = functools.partial(self._collate, evaluation=True, decoding=decoding)
        return DataLoader(rows, batch_size=EVALUATION_ROWS, collate_fn=collate)  # type: ignore[arg-type]

    def training_sample(self) -> list[Row]:
        """This process's part of a fixed sample of training rows, as many as validation sees."""
        trainer: Any = self.trainer
        validated, rows = int(sum(trainer.num_val_batches)) * EVALUATION_ROWS, self.rows["train"]
        if batches := trainer.overfit_batches:  # the only batches trained on: a number or a share
            batches *= 1 if isinstance(batches, int) else math.ceil(len(rows) / self.rows_per_step)
            order = ResumableSampler(len(rows), int(os.environ.get("PL_GLOBAL_SEED", 0)))
            rows = [rows[i] for i in islice(order, int(batches) * self.rows_per_step)]
        return self._share(sample(rows, min(len(self.rows["validation"]), validated)))

    def _collate(self, rows: list[Row], evaluation: bool = False, decoding: Any = None) -> Any:
        """This process's part of the rows, as the model's batch; the rows themselves without a model."""
        if self.trainer is None:
            return rows
        model: Any = self.trainer.lightning_module
        return model.collate(self._share(rows), evaluation, decoding)

    def _share(self, rows: list[Row]) -> list[Row]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return rows[rank::world]
