"""The LightningModule: one batch is one optimizer step, and answers are judged by the contract as they are decoded."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from formtune.base.folder import context_length
from formtune.base.identity import contract_hash, identity
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import Fault, UserError, first_line
from formtune.evaluation.metrics import EXACT, FormatMetrics, LossMetrics, OwnMetrics
from formtune.formats import Format, Verdict
from formtune.model.adapter_state import AdapterState
from formtune.model.choice import passes
from formtune.model.constrained import Grammar
from formtune.model.fsdp import ShardedBase
from formtune.model.lora import Lora, add_lora, check_layers, load_base
from formtune.model.micro_batches import Passes

EVALUATION = 16  # tokens evaluated together, answers included, for each token of a training pass
PARITY = 2  # rows of each evaluation batch that are decoded in full as well
SKIPPED = 20  # steps in a row without a finite gradient that end a run; 16-mixed needs some to find its scale


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to a row, and what the contract says of it."""

    row: Row
    text: str
    verdict: Verdict


def _check_optimizer(factory: OptimizerCallable) -> None:
    """Try the optimizer's values before anything slow is done with the model.

    Raises:
        UserError: One is refused, or is no finite number.
    """
    try:
        values = factory([torch.nn.Parameter(torch.zeros(1, 1))]).defaults
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer: {first_line(error)}") from error
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.optimizer: {name} is {value}, it must be a finite number")


class FormatModule(AdapterState):
    """A causal language model with LoRA, trained on answers and judged by exact format compliance.

    One batch holds the rows of one optimizer step. The step is computed in as many passes as fit `tokens_per_pass`,
    the loss of each divided by the target tokens of the whole step on all devices: how a step is split changes
    nothing but its memory, and every count of steps is a count of optimizer steps.

    Args:
        base: Folder or hub id of the base model.
        format: The contract that answers must keep (follows `data.format`).
        lora: The adapters.
        optimizer: Optimizer of the adapters; `--model.optimizer.lr 1e-4` sets the peak learning rate.
        warmup: Share of all steps in which the learning rate rises; it then falls along a cosine to zero.
        max_grad_norm: Norm that gradients are clipped to; 0 switches clipping off.
        max_new_tokens: Tokens of the longest answer that evaluation decodes.
        tokens_per_pass: Tokens computed at once, a shared prefix counted once (evaluation, which keeps no activations,
            takes 16 times as many); lower it if memory runs out, the result stays the same.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory, a third slower.
        compile: Compile the layers with torch.compile: about a minute at the start, then each step is shorter.
        quantize: Load the frozen base in 4 bits (QLoRA, arXiv:2305.14314); needs the extra `qlora`.
        constrained: Evaluate and predict under the contract's grammar: only tokens that can still lead to a document
            are chosen from, so an answer that ends is in format, and `format/exact` says how many ended in time.
            Training, losses and `val/tf_exact` stay the same. Keys come in the schema's order, and none that it does
            not name. Needs the extra `constrained`.
        metrics: Metrics of your own, each a `torchmetrics.Metric` whose `update` takes the answers and the wanted
            answers, two lists of texts; shown as `own/` and the name of the class.
    """

    def __init__(
        self,
        base: str,
        format: Format,
        lora: Lora = Lora(),
        # No weight decay: adapters begin at zero and need no pull towards it.
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-4, weight_decay=0.0, fused=True),
        warmup: ClosedUnitInterval = 0.1,
        max_grad_norm: NonNegativeFloat = 1.0,
        max_new_tokens: PositiveInt = 256,
        tokens_per_pass: PositiveInt = 4096,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        quantize: Literal["4bit"] | None = None,
        constrained: bool = False,
        metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__()
        check_layers(base, lora)
        _check_optimizer(optimizer)
        # No save_hyperparameters(): on resume the checkpoint's values would silently beat YAML and flags.
        self.automatic_optimization = False
        self.base, self.format, self.lora, self.quantize = base, format, lora, quantize
        self.optimizer_factory, self.warmup, self.max_grad_norm = optimizer, warmup, max_grad_norm
        self.max_new_tokens, self.tokens_per_pass = max_new_tokens, tokens_per_pass
        self.gradient_checkpointing, self.compile_passes = gradient_checkpointing, compile
        self.constrained = constrained
        self.grammar: Grammar | None = None
        self.model: Any = None
        self.verdicts, self.losses, self.own = FormatMetrics(format), LossMetrics(), OwnMetrics(metrics)
        self.logs_evaluations = True  # False keeps an evaluation that is no point of the curves out of them
        self._clock, self._tokens = time.perf_counter(), 0
        self.skipped = self._skipped_in_a_row = 0  # steps that were left out

    def configure_model(self) -> None:
        """Load the base and add the adapters; Lightning calls this before every fit, test and predict."""
        if self.model is not None:
            return
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.renderer = Renderer.load(self.base)
        self.context = context_length(self.base)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.trainer.precision, torch.float32)
        # What is to be split may have no room elsewhere as a whole.
        device = torch.device("cpu") if self._sharded else self.trainer.strategy.root_device
        base = load_base(self.base, dtype, self.quantize, device)
        if base.get_input_embeddings().num_embeddings < len(self.renderer.tokenizer):
            raise UserError(f"model.base: the tokenizer of {self.base} has more tokens than the model has embeddings")
        if self.constrained:
            self.grammar = Grammar(self.format, self.renderer)
        self._identity = {"base": identity(self.base, base.config), "contract": contract_hash(self.format)}
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(self._seed)  # adapters begin alike whatever was drawn before
        self.model = add_lora(base, self.lora, quantized=bool(self.quantize))
        self._trained = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        if self._sharded:
            self._sharded.shard(self, self.model)
        if self.compile_passes:
            for layer in self.model.modules():
                # One layer's code serves them all; a whole model would be compiled again for each kind of pass.
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=True)

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def _sharded(self) -> ShardedBase | None:
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, ShardedBase) else None

    @functools.cached_property
    def passes(self) -> Passes:
        """How batches go through the model; found at the first one, when the model is where it will run."""
        return passes(self.model)

    def configure_optimizers(self) -> Any:
        from transformers import get_cosine_schedule_with_warmup

        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trained)
        # Fused optimizers would scale 16-mixed gradients back inside step(), after they should have been clipped.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer.max_steps: set it, since the learning rate needs an end to fall towards")
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: list[Row], batch_idx: int) -> None:
        """One optimizer step over the batch's rows; one whose gradient is no finite number is left out and counted.

        Raises:
            Fault: Memory ran out, or `SKIPPED` steps in a row had to be left out.
        """
        optimizer: Any = self.optimizers()
        # Noise is a function of seed, step and process: nothing that happens between two steps changes the next one.
        torch.manual_seed((self._seed * 1_000_003 + self.trainer.global_step) * 8191 + self.trainer.global_rank)
        tokens = torch.tensor(sum(len(row.target) for row in batch), device=self.device)
        tokens = self.trainer.strategy.reduce(tokens, reduce_op="sum")
        # DDP averages the gradients of its ranks; the step's gradient is their sum over all its tokens.
        scale = self.trainer.world_size / tokens
        nats = torch.zeros((), device=self.device)
        groups = list(self.passes.split(batch, self.tokens_per_pass))
        # Fewer rows than ranks: even a process without any joins the gradient exchange.
        count = max(len(groups), 1)
        if self._sharded:
            count = self._sharded.most(count)
        blank = count - len(groups)
        groups = [self.passes.blank()] * blank + groups
        with _memory_named(batch, self.tokens_per_pass):
            for i, group in enumerate(groups):
                with contextlib.nullcontext() if i == count - 1 else self._unsynced():
                    loss = self.passes.predictions(group)[0].loss * (i >= blank)
                    self.manual_backward(loss * scale)
                nats += loss.detach()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self._log_step(self.trainer.strategy.reduce(nats, reduce_op="sum") / tokens, rate, batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # Here and not in training_step: under 16-mixed the gradients have just been scaled back.
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        if torch.isfinite(norm):  # the same on all processes, since gradients were exchanged
            self._skipped_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # an optimizer leaves such a parameter and its moments as they are
        self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
        if self._skipped_in_a_row == SKIPPED:
            raise Fault(
                f"model.optimizer: {SKIPPED} steps in a row had a gradient that is no finite number (up to step "
                f"{self.trainer.global_step}); the checkpoints before are kept; lower the learning rate or look at the "
                "rows by formtune audit"
            )

    def _unsynced(self) -> Any:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()

    def _log_step(self, loss: Tensor, rate: float, batch: list[Row]) -> None:
        self._tokens += sum(map(len, batch)) * self.trainer.world_size  # ranks hold equal shares, or nearly
        figures: dict[str, Any] = {"train/loss": loss, "train/learning_rate": rate}
        if self.skipped:
            figures["train/skipped_steps"] = float(self.skipped)
        trainer: Any = self.trainer
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            now = time.perf_counter()
            figures["train/tokens_per_second"] = self._tokens / (now - self._clock)
            self._clock, self._tokens = now, 0
        self.log_dict(figures, prog_bar=True, batch_size=1)
        self._log_step_number()

    def _log_step_number(self) -> None:
        # Lightning would write step 99 for what was measured after 100 steps.
        self.log("step", float(self.trainer.global_step), batch_size=1)

    def on_train_start(self) -> None:
        self._clock, self._tokens = time.perf_counter(), 0

    def on_validation_end(self) -> None:
        self._clock, self._tokens = time.perf_counter(), 0  # evaluation is not training time

    def validation_step(self, batch: list[Row], batch_idx: int) -> Any:
        """Loss and greedy answers of the rows from the same passes, and their verdicts: the list of `Answer`."""
        said = self._decode(batch, self.losses)
        sample = sorted({len(batch) * i // PARITY for i in range(PARITY)}) if batch else []
        in_full = self._decode([replace(batch[i], target=[], is_value=[]) for i in sample])
        same = [answer == said[i] for i, answer in zip(sample, in_full, strict=True)]
        self.losses.compare(same)
        if not all(same):
            rank_zero_warn(
                f"{batch[sample[same.index(False)]].where}: decoded in full this row gets another answer than decoded "
                "from where it leaves its target: two tokens are equally likely but for rounding (see val/parity)"
            )
        answers = [self._judge(row, ids) for row, ids in zip(batch, said, strict=True)]
        self.verdicts.update([answer.verdict for answer in answers])
        self.own.update([answer.text for answer in answers], [answer.row.gold or "" for answer in answers])
        return answers

    def test_step(self, batch: list[Row], batch_idx: int) -> Any:
        """The same on the test rows."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Row], batch_idx: int) -> list[Answer]:
        """Greedy answers to prompts, judged by the contract."""
        return [self._judge(row, ids) for row, ids in zip(batch, self._decode(batch), strict=True)]

    def _decode(self, rows: list[Row], losses: LossMetrics | None = None) -> list[list[int]]:
        """Greedy answers in token ids, in the order of the rows; the targets' loss goes to `losses`."""
        limits = [min(self.max_new_tokens, (self.context or 10**9) - len(row.prompt)) for row in rows]
        said: list[list[int]] = [[] for _ in rows]
        budget = EVALUATION * self.tokens_per_pass
        stop = self.renderer.stop_ids
        with self._in_step():
            for indices, found, answers in self.passes.evaluate(rows, budget, stop, limits, self.grammar):
                for i, answer in zip(indices, answers, strict=True):
                    said[i] = answer
                if losses is not None:
                    members = [rows[i] for i in indices]
                    is_value = torch.tensor([v for row in members for v in row.is_value], device=self.device)
                    sizes = [len(row.target) for row in members]
                    losses.update(found.nats, found.tokens == found.targets, is_value, sizes)
        return said

    def _in_step(self) -> Any:
        """Around forward passes of which another process may do more or fewer."""
        passes = self.passes
        if not self._sharded:
            return contextlib.nullcontext()
        return self._sharded.in_step(lambda: passes.predictions(passes.blank()))

    def _judge(self, row: Row, ids: list[int]) -> Answer:
        text, finished = self.renderer.answer(ids)
        return Answer(row, text, self.format.check(text, finished=finished, gold=row.gold, source=row.source))

    @torch.no_grad()
    def teacher_forced_loss(self, rows: list[Row]) -> Tensor:
        """Loss over the rows of all processes in nats per token; each process gives its share. Decodes nothing."""
        sums = torch.zeros(2, dtype=EXACT, device=self.device)
        # The precision and the passes of validation, with its room for answers: equal rows get an equal loss.
        with self.trainer.precision_plugin.forward_context(), self._in_step():
            for group in self.passes.split(rows, EVALUATION * self.tokens_per_pass, self.max_new_tokens):
                nats = self.passes.predictions(group)[0].nats
                sums += torch.stack([nats.sum(dtype=EXACT), sums.new_tensor(nats.numel())])
        nats, tokens = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return nats / tokens

    @property
    def validation_names(self) -> set[str]:
        """Names of all that a validation measures."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing was measured yet
            found = {f"val/{name}" for name in LossMetrics().compute()} | set(FormatMetrics(self.format).compute())
        return found

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("", "val/")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test/", "test/")

    def _log_evaluation(self, verdict_prefix: str, loss_prefix: str) -> None:
        values: dict[str, Any] = {loss_prefix + name: value for name, value in self.losses.compute().items()}
        values |= {verdict_prefix + name: value for name, value in self.verdicts.compute().items()}
        values |= {verdict_prefix + name: value for name, value in self.own.compute().items()}
        self.evaluation = {name: float(value) for name, value in values.items()}
        # compute() leaves each process with its own counts again
        with self.verdicts.sync_context(), self.losses.sync_context():
            self.counts = self.verdicts.counts() | self.losses.counts()
        shown = ("val/loss", "format/exact")
        if self.logs_evaluations:
            for name, value in values.items():
                self.log(name, value, prog_bar=name in shown, batch_size=1)
            self._log_step_number()
        for metrics in (self.losses, self.verdicts, self.own):
            metrics.reset()


@contextlib.contextmanager
def _memory_named(rows: Sequence[Row], tokens: int) -> Iterator[None]:
    """Say which rows were in work when memory ran out, and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        longest = max(rows, key=len)
        raise Fault(
            f"out of memory in a step of {len(rows)} rows, the longest {longest.where} with {len(longest)} tokens; "
            f"lower model.tokens_per_pass (now {tokens}) or set model.gradient_checkpointing: true"
        ) from error
