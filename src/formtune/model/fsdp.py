"""`--trainer.strategy fsdp`: each process keeps a part of every frozen layer, and the whole of it while it computes.

What is trained is small and stays whole on all processes, as under DDP: checkpoints, clipping and the adapter are the
same. The layers are gathered by PyTorch's `fully_shard`, which all processes must ask for at the same time, though
they have different numbers of passes and their answers end at different lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from formtune.model.ranks import highest


class ShardedBase(DDPStrategy):
    """DDP for what is trained, with the frozen decoder layers split among the processes; the embeddings stay whole."""

    _decoder: Any = None

    def shard(self, module: Any, model: Any) -> None:
        """Keep a part of each layer, before the first pass.

        Args:
            module: The LightningModule that holds the model.
            model: A causal language model with adapters, the same on all processes.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._decoder = decoder = model.get_base_model().get_decoder()
        # A group of its own: DDP exchanges gradients while layers are gathered for the backward pass.
        mesh = DeviceMesh.from_group(dist.new_group(), self.root_device.type)
        whole = {p for p in decoder.parameters() if p.requires_grad}
        for layer in decoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh, ignored_params=whole)
        # Its forward passes fetch the next layer while one computes.
        fully_shard(decoder, mesh=mesh, ignored_params=whole | {p for p in decoder.parameters() if _whole(p)})
        module._ddp_params_and_buffers_to_ignore = [n for n, p in module.named_parameters() if not _whole(p)]

    @contextlib.contextmanager
    def in_step(self, blank: Callable[[], Any]) -> Iterator[None]:
        """Let each process do any number of forward passes; one that has done its own joins the others in theirs.

        Args:
            blank: A forward pass that nobody needs.
        """
        hook = self._decoder.register_forward_pre_hook(self._announce)
        try:
            yield
        finally:
            hook.remove()
        while self.most(0):
            blank()

    def _announce(self, *_: Any) -> None:
        self.most(1)

    def most(self, count: int) -> int:
        """The highest count of all processes."""
        assert self.lightning_module is not None
        return int(highest(self.lightning_module.trainer, count)[0])


def _whole(parameter: torch.Tensor) -> bool:
    return not isinstance(parameter, DTensor)
