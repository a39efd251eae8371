"""What the processes of a run exchange, and `--trainer.strategy fsdp`.

Under FSDP each rank keeps a shard of every frozen layer and gathers the layer to compute it. `fully_shard` gathers a
layer when all ranks call it, so all ranks need the same number of forward passes.
"""

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from formtune.model.lora import decoder_layers
from formtune.model.micro_batches import MicroBatches

T = TypeVar("T")


def max_over_ranks(trainer: Any, *values: float) -> list[float]:
    if trainer.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(tensor, reduce_op="max").tolist()  # type: ignore[no-any-return]


def all_gather(trainer: Any, part: list[T]) -> list[T]:
    """The parts of all processes in the order of their ranks."""
    if trainer.world_size == 1:
        return part
    parts: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(parts, part)
    return list(chain(*parts))


class ShardedBase(DDPStrategy):
    """DDP for the trained parameters, FSDP for the frozen decoder layers; the embeddings are not sharded."""

    def shard(self, module: Any, model: Any) -> None:
        """Shard the decoder layers of `model`, a causal language model with adapters."""
        decoder = model.get_base_model().get_decoder()
        # A separate group: DDP exchanges gradients while layers are gathered for the backward pass.
        mesh = DeviceMesh.from_group(dist.new_group(), self.root_device.type)
        trained = {p for p in decoder.parameters() if p.requires_grad}
        for layer in decoder_layers(decoder):
            fully_shard(layer, mesh=mesh, ignored_params=trained)
        # As the root, it fetches the next layer while one computes.
        unsharded = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
        fully_shard(decoder, mesh=mesh, ignored_params=trained | unsharded)
        module._ddp_params_and_buffers_to_ignore = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]


def with_dummies(trainer: Any, micro_batches: list[Any], dummy: Callable[[], Any]) -> list[Any]:
    """Dummies, then the micro-batches: at least one, to join the gradient exchange; under FSDP as many on each rank."""
    count = max(len(micro_batches), 1)
    if isinstance(trainer.strategy, ShardedBase):
        count = int(*max_over_ranks(trainer, count))
    return [dummy()] * (count - len(micro_batches)) + micro_batches


@contextlib.contextmanager
def uneven_counts(trainer: Any, micro_batches: MicroBatches) -> Iterator[None]:
    """Allow uneven forward counts per rank: under FSDP, a rank that is done runs dummy passes until all are."""
    if not isinstance(trainer.strategy, ShardedBase):
        yield
        return

    def announce(*_: Any) -> None:
        max_over_ranks(trainer, 1)

    hook = micro_batches.base.get_decoder().register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    while max_over_ranks(trainer, 0)[0]:
        micro_batches.predictions(micro_batches.dummy())
