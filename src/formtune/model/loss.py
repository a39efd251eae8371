"""Next-token loss of the targets: logits are computed only where a label is predicted, and in chunks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Logits of a chunk: on a CPU 32 MiB in float32, since larger blocks are mapped anew each time, page by page.
CHUNK_LOGITS = {"cpu": 2**23 - 2**10, "cuda": 2**26}


@dataclass(slots=True)
class Predictions:
    """What the model predicts at each label, row after row."""

    targets: Tensor  # the labels, -1 where there is none
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
        logits = head(chunk).float()
        tokens = logits.argmax(-1)
        nll, total = _nll_in_place(logits, labels)
        chunks.append((nll, tokens, -total.log().squeeze(-1)))
    return Predictions(targets, *(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token per row of logits, shape (rows,)."""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


class _Loss(torch.autograd.Function):
    """Computes each chunk's gradient while its logits exist; `backward` scales it (as Liger, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Any, size: int) -> Tensor:
        grads, nll = [], []
        for chunk, labels in zip(hidden.detach().split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                logits = head(chunk.requires_grad_())
            grad = logits.detach().float()  # overwrites logits: the backward pass of a frozen head needs none
            chunk_nll, total = _nll_in_place(grad, labels)
            nll.append(chunk_nll)
            # d loss / d logits = softmax - one-hot label
            grad.div_(total)
            grad.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), -torch.ones_like(grad[:, :1]))
            grad.masked_fill_((labels < 0).unsqueeze(-1), 0.0)
            grads += torch.autograd.grad(logits, chunk, grad.to(logits.dtype))
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(nll).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None, None, None


def _labels_per_chunk(hidden: Tensor, vocabulary: int) -> int:
    """Labels whose logits are computed at once."""
    return max(1, CHUNK_LOGITS.get(hidden.device.type, 2**25) // vocabulary)


def _nll_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each label, 0 where it is -1, and each row's sum of exp(logit - largest); `logits` become these exps."""
    logits -= logits.amax(-1, keepdim=True)
    label_logits = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1))
    total = logits.exp_().sum(-1, keepdim=True)
    nll = (total.log() - label_logits).squeeze(-1)
    return nll.masked_fill(targets < 0, 0.0), total
