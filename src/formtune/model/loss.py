"""Next-token loss of the targets: logits are computed only where a label is predicted, and in chunks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits per chunk: on a CPU just under 32 MiB in float32, since malloc maps larger blocks anew each time.
CHUNK_LOGITS = {"cpu": 2**23 - 2**10, "cuda": 2**25}
NO_LABEL = -1


@dataclass(slots=True)
class Predictions:
    """What the model predicts at each label, row after row."""

    nll: Tensor  # negative log-likelihood of each label in nats, float32, 0 where there is none
    tokens: Tensor  # the most likely tokens
    logprobs: Tensor  # their log-probabilities


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Summed NLL of the labels in nats, from the hidden states that predict them, (labels, width); `head` is frozen."""
    return _Loss.apply(hidden, targets, head, _labels_per_chunk(hidden, vocabulary))  # type: ignore[no-any-return]


@torch.no_grad()
def predict(head: nn.Module, hidden: Tensor, targets: Tensor, vocabulary: int) -> Predictions:
    """Predictions from hidden states, shape (labels, width)."""
    size = _labels_per_chunk(hidden, vocabulary)
    chunks = []
    for chunk, labels in zip(hidden.split(size), targets.split(size), strict=True):
        logprobs = head(chunk).float().log_softmax(-1)
        largest, tokens = logprobs.max(-1)
        chunks.append((F.nll_loss(logprobs, labels, ignore_index=NO_LABEL, reduction="none"), tokens, largest))
    return Predictions(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


class _Loss(torch.autograd.Function):
    """Computes each chunk's gradient while its logits exist; `backward` scales it (as Liger, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Any, size: int) -> Tensor:
        grads, losses = [], []
        for chunk, labels in zip(hidden.detach().split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                logits = head(chunk.requires_grad_()).float()
                loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
            losses.append(loss.detach())
            grads += torch.autograd.grad(loss, chunk)
        ctx.save_for_backward(torch.cat(grads))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None, None, None


def _labels_per_chunk(hidden: Tensor, vocabulary: int) -> int:
    """Labels whose logits are computed at once."""
    return max(1, CHUNK_LOGITS.get(hidden.device.type, 2**25) // vocabulary)
