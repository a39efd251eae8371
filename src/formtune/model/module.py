"""The LightningModule: one batch is one optimizer step; evaluation decodes greedily and checks each answer's format."""

import contextlib
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal

import lightning.pytorch as L
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torchmetrics import Metric

from formtune.base.folder import check_identity, context_length, format_hash, identity, meta_model, template_hash
from formtune.base.renderer import Renderer, read_template
from formtune.base.row import Row
from formtune.errors import Fault, UserError
from formtune.evaluation.metrics import LossMetrics, Scores, ratios
from formtune.evaluation.outcomes import Decoded, Outcome, check_answer
from formtune.files import optional
from formtune.formats import Format
from formtune.formats.content import Orders
from formtune.model.lora import Lora, add_lora, compile_layers, difference, load_base, lora_config
from formtune.model.micro_batches import Batch, Decoding, MicroBatches, choose_micro_batches, explain_out_of_memory
from formtune.model.optimization import CosineWithWarmup, build_optimizer, check_optimizer
from formtune.model.ranks import ShardedBase, all_gather, uneven_counts, with_dummies

EVALUATION_FACTOR = 16  # tokens of an evaluation micro-batch, answers included, as a multiple of a training one's
MAX_SKIPPED = 20  # skipped steps in a row that abort a run; 16-mixed skips a few while it finds its scale
PARITY_ROWS = 2  # rows of each evaluation batch that are also decoded in full


class FormatModule(L.LightningModule):
    """A causal language model with LoRA, trained on answers and evaluated by exact format compliance.

    One batch is one optimizer step, computed in as many micro-batches as fit `tokens_per_micro_batch`. The loss of each
    is divided by the target tokens of the whole step on all devices, so the budget changes memory and nothing else.

    Args:
        base: Folder or Hub id of the base model.
        format: The format that answers must have (follows `data.format`).
        chat_template: File of a Jinja chat template that replaces the base's own.
        adapter: Trained adapter to start from: a finished run, or the folder or Hub id of a PEFT adapter.
        lora: The adapters.
        optimizer: Optimizer of the adapters; `--model.optimizer.lr 1e-4` sets the peak learning rate.
        scheduler: Learning-rate schedule, stepped after each optimizer step.
        max_grad_norm: Norm that gradients are clipped to; 0 disables clipping.
        max_new_tokens: Tokens of the longest answer that evaluation decodes.
        tokens_per_micro_batch: Maximum tokens of a forward pass, a shared prefix counted once; 16 times as many in
            evaluation, which keeps no activations. Lower it if memory runs out; the result stays the same.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory, a third slower.
        compile: Compile the layers with torch.compile: about a minute at the start, then faster steps.
        quantize: Load the frozen base in 4 bits (QLoRA, arXiv:2305.14314); needs the extra `qlora`.
        constrained: Use constrained decoding in every evaluation and in `predict`: only tokens that can still lead to a
            valid format are allowed. Training and losses stay the same. JSON keys follow the order of the
            training targets; if the targets differ, any order is allowed. Needs the extra `constrained`.
        metrics: Custom metrics, each a `torchmetrics.Metric` whose `update` takes answers and targets as two lists of
            strings; logged as `custom/` and the name of the class.
    """

    def __init__(
        self,
        base: str,
        format: Format,
        chat_template: str | None = None,
        adapter: str | None = None,
        lora: Lora = Lora(),
        # No weight decay: adapters start at zero and need no pull towards it.
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-4, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable = lambda o: CosineWithWarmup(o, warmup=0.1),
        max_grad_norm: NonNegativeFloat = 1.0,
        max_new_tokens: PositiveInt = 256,
        tokens_per_micro_batch: PositiveInt = 4096,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        quantize: Literal["4bit"] | None = None,
        constrained: bool = False,
        metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__()
        lora_config(meta_model(base), lora)  # checks the layers' names before the weights are read
        self.adapter = optional("warm_start.adapter", "TrainedAdapter", "model.adapter")(adapter) if adapter else None
        if self.adapter:
            self.adapter.check(lora)
        check_optimizer(optimizer, scheduler)
        # No save_hyperparameters(): on resume the checkpoint's values would silently override YAML and flags.
        self.automatic_optimization = False  # the number of micro-batches differs from step to step
        self.base, self.format, self.lora, self.quantize = base, format, lora, quantize
        self.context = context_length(base) or 10**9
        self.template = read_template(chat_template)
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.max_new_tokens, self.tokens_per_micro_batch = max_new_tokens, tokens_per_micro_batch
        self.gradient_checkpointing, self.compile_layers = gradient_checkpointing, compile
        self.orders: Orders | None = None  # of keys, for constrained decoding; None allows any
        self.model: Any = None
        self.scores = Scores(format, metrics)
        self.constrained, self.max_grad_norm = constrained, max_grad_norm or float("inf")
        self.skipped = self.skipped_in_a_row = 0  # steps with a non-finite gradient
        self.logged = True  # whether the evaluation in progress goes to the logger
        self.outcomes: list[Outcome] = []  # of the last evaluation on all processes, in the order of the rows
        self._checked: list[tuple[int, Outcome]] = []  # of the evaluation in progress on this process

    def configure_model(self) -> None:
        """Load the base and add the adapters; Lightning calls this before every fit, test and predict."""
        if self.model is not None:
            return
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.renderer = Renderer.load(self.base, template=self.template, tags=self.format.tags)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.trainer.precision, torch.float32)
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ShardedBase)  # then the base may not fit on one device
        base = load_base(self.base, dtype, self.quantize, torch.device("cpu") if sharded else strategy.root_device)
        if base.get_input_embeddings().num_embeddings < len(self.renderer.tokenizer):
            raise UserError(f"model.base: the tokenizer of {self.base} has more tokens than the model has embeddings")
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if splits := getattr(datamodule, "splits", None):
            self.orders = splits.orders
        if self.constrained:
            rows = getattr(datamodule, "rows", {})
            for row in (*rows.get("validation", ()), *rows.get("test", ())):
                self.grammar.matcher(row)  # refuses a format without a grammar before training
        self._identity: dict[str, Any] = {
            "base": identity(self.base), "format": format_hash(self.format), "processes": self.trainer.world_size,
            "orders": self.orders, "template": template_hash(self.renderer.tokenizer),
            "adapter": self.adapter.hash if self.adapter else None,
        }  # fmt: skip
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(self.seed)  # equal initial adapters, whatever drew random numbers before
        self.model = add_lora(base, self.lora, quantized=bool(self.quantize))
        if self.adapter:
            self.adapter.check_base(self.base, self._identity["base"])
            self.adapter.load(self.model)
        self._trained = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        if isinstance(strategy, ShardedBase):
            strategy.shard(self, self.model)
        if self.compile_layers:
            compile_layers(self.model)

    @functools.cached_property
    def grammar(self) -> Any:
        return optional("constrained.decoder", "Grammar", "model.constrained")(self.format, self.renderer, self.orders)

    @functools.cached_property
    def micro_batches(self) -> MicroBatches:
        """How batches go through the model; chosen at the first batch, when the model is on its device."""
        # Batches are collated outside of autocast, where a base of 16 bits and adapters of 32 do not multiply.
        with self.trainer.precision_plugin.forward_context():
            return choose_micro_batches(self.model)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return build_optimizer(self.optimizer_factory, self.scheduler_factory, parameters, self.trainer)

    def collate(self, rows: Sequence[Row], evaluation: bool, decoding: Decoding | None = None) -> Batch:
        """This process's rows of an optimizer step or of an evaluation as a batch; the data module calls it."""
        if not evaluation:
            return Batch(rows, list(self.micro_batches.split(rows, self.tokens_per_micro_batch)))
        decoding = decoding or Decoding()
        most = min(self.max_new_tokens, decoding.max_new_tokens or self.max_new_tokens)
        limits = [min(most, self.context - len(row.prompt_ids)) for row in rows]
        parts = self.micro_batches.split(rows, EVALUATION_FACTOR * self.tokens_per_micro_batch, max(limits, default=0))
        return Batch(rows, list(parts), limits, decoding)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step over the batch's rows; a step with a non-finite gradient is skipped and counted."""
        optimizer: Any = self.optimizers()
        strategy, started = self.trainer.strategy, time.perf_counter()
        # Dropout is a function of seed, step and rank: nothing that happens between two steps changes the next one.
        seed = (self.seed * 1_000_003 + self.trainer.global_step) * 8191 + self.trainer.global_rank
        torch.manual_seed(seed % 2**63)
        sizes = [sum(len(row.target_ids) for row in batch.rows), sum(map(len, batch.rows))]
        tokens, all_tokens = strategy.reduce(torch.tensor(sizes, device=self.device), reduce_op="sum")
        # DDP averages gradients over the ranks; the step's gradient is their sum, divided by the tokens of all ranks.
        scale = self.trainer.world_size / tokens
        nats = torch.zeros((), device=self.device)
        micro_batches = with_dummies(self.trainer, batch.micro_batches, self.micro_batches.dummy)
        dummies = len(micro_batches) - len(batch.micro_batches)
        no_sync = getattr(strategy, "block_backward_sync", contextlib.nullcontext)  # of several processes
        with explain_out_of_memory(batch.rows, self.tokens_per_micro_batch):
            for i, micro_batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1  # gradients are exchanged once, in its backward pass
                with contextlib.nullcontext() if last else no_sync():
                    loss = self.micro_batches.loss(micro_batch) * (i >= dummies)
                    self.manual_backward(loss * scale)
                nats += loss.detach()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        metrics = {"train/loss": strategy.reduce(nats, reduce_op="sum") / tokens, "train/learning_rate": rate}
        metrics["train/tokens_per_second"] = all_tokens / (time.perf_counter() - started)
        if self.skipped:
            metrics["train/skipped_steps"] = float(self.skipped)
        self.log_dict(metrics, prog_bar=True, batch_size=1)
        # Lightning would log values after step 100 as step 99.
        self.log("step", float(self.trainer.global_step), batch_size=1)
        return {"loss": metrics["train/loss"]}  # for callbacks

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradients, or drop them all if one is non-finite."""
        # Here and not in training_step: 16-mixed has just unscaled the gradients.
        parameters = [p for p in self.parameters() if p.grad is not None]
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)):  # the same on all ranks
            self.skipped_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # then the optimizer leaves parameter and moments unchanged
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            what = f"{MAX_SKIPPED} steps in a row had a non-finite gradient (up to step {self.global_step})"
            raise Fault(f"model.optimizer: {what}; lower the learning rate, or check the rows with formtune audit")

    def on_validation_epoch_start(self) -> None:
        self._checked = []

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and greedy answers of the rows from the same forward passes."""
        rows, self.logged = batch.rows, batch.decoding.logged
        decoded = self._decode(batch, self.scores.losses)
        sample = sorted({len(rows) * i // PARITY_ROWS for i in range(PARITY_ROWS)}) if rows else []
        in_full = self._decode(self.collate([replace(rows[i], target_ids=[]) for i in sample], True, batch.decoding))
        self.scores.losses.compare([answer.ids == decoded[i].ids for i, answer in zip(sample, in_full, strict=True)])
        self._checked += self._check(rows, decoded)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Outcome]:
        checked = self._check(batch.rows, self._decode(batch))
        self._checked += checked
        return [one for _, one in checked]

    def on_predict_epoch_end(self) -> None:
        self.outcomes = [one for _, one in sorted(all_gather(self.trainer, self._checked), key=itemgetter(0))]

    def on_validation_epoch_end(self) -> None:
        self.on_predict_epoch_end()
        self.evaluation, self.counts = self.scores.compute(self.outcomes, [one for _, one in self._checked])
        if self.logged:
            for name, value in self.evaluation.items():
                tag = f"test/{name.removeprefix('val/')}" if self.trainer.testing else name
                self.log(tag, value, prog_bar=tag in ("val/loss", "format/exact"), batch_size=1)
            self.log("step", float(self.trainer.global_step), batch_size=1)

    on_test_epoch_end = on_validation_epoch_end

    def _decode(self, batch: Batch, losses: LossMetrics | None = None) -> list[Decoded]:
        """The greedy answers, in the order of the rows; the targets' loss goes to `losses`."""
        grammar = self.grammar if any(batch.limits) and (self.constrained or batch.decoding.constrained) else None
        stop = self.renderer.stop_ids
        model = self.model.disable_adapter() if batch.decoding.untuned else contextlib.nullcontext()
        named = explain_out_of_memory(batch.rows, self.tokens_per_micro_batch)
        with named, uneven_counts(self.trainer, self.micro_batches), model:
            return self.micro_batches.decode(batch.rows, batch.micro_batches, stop, batch.limits, grammar, losses)

    def _check(self, rows: Sequence[Row], decoded: Sequence[Decoded]) -> list[tuple[int, Outcome]]:
        pairs = zip(rows, decoded, strict=True)
        return [(row.number, check_answer(row, answer, self.renderer, self.format)) for row, answer in pairs]

    def teacher_forced_loss(self, rows: Sequence[Row]) -> float:
        """Loss over the rows of all processes, in nats per token, without decoding; each process passes its share."""
        losses, batch = LossMetrics().to(self.device), self.collate(rows, evaluation=True)
        batch.limits = [0] * len(rows)
        # Precision and micro-batches as in validation: equal rows get an equal loss.
        with self.trainer.precision_plugin.forward_context():
            self._decode(batch, losses)
        return ratios(losses.compute())["val/loss"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["formtune"] = self._identity | {"skipped": [self.skipped, self.skipped_in_a_row]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved: Any = checkpoint.get("formtune")
        check_identity(saved, self._identity, resumes := self.trainer.state.fn == "fit")
        self.orders = saved["orders"]  # of the training targets, also for prompts alone
        self.__dict__.pop("grammar", None)
        if resumes:
            self.skipped, self.skipped_in_a_row = saved["skipped"]

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> Any:
        raise UserError("a checkpoint has the adapters alone: build FormatModule(...), give ckpt_path to the trainer")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in self._trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if name := difference(self.state_dict(), state_dict):
            raise UserError(f"ckpt_path: the checkpoint has a different model.lora (targets or rank); first {name}")
        if not all(torch.isfinite(value).all() for value in state_dict.values()):
            raise UserError("ckpt_path: the checkpoint has non-finite weights")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
