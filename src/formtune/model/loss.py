"""Next-token loss of the targets: logits are computed only where a label is predicted, and in chunks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Logits of a chunk: on a CPU 32 MiB in float32, since larger blocks are mapped anew each time, page by page.
LOGITS = {"cpu": 2**23 - 2**10, "cuda": 2**26}


@dataclass(slots=True)
class Predictions:
    """Result of a teacher-forced pass: a value for each label, row after row."""

    targets: Tensor  # the labels, -1 where there is none
    loss: Tensor  # sum of `nats`, with a gradient if gradients are enabled
    nats: Tensor  # negative log-likelihood of each label in float32, 0 where there is none
    tokens: Tensor  # the most likely tokens; empty if gradients are enabled, as the next two
    chosen: Tensor  # the most likely tokens among those allowed
    logprobs: Tensor  # their log-probabilities, normalised over the allowed tokens


def predict(
    head: nn.Module, hidden: Tensor, targets: Tensor, vocabulary: int, bitmask: Tensor | None = None
) -> Predictions:
    """Predictions from hidden states, shape (labels, width); `bitmask` has the allowed tokens, 32 per number."""
    size = max(1, LOGITS.get(hidden.device.type, 2**25) // vocabulary)
    if torch.is_grad_enabled():
        trained = [p for p in head.parameters() if p.requires_grad]
        loss, nats = _Loss.apply(hidden, targets, head, size, *trained)
        return Predictions(targets, loss, nats, *[targets.new_empty(0)] * 3)
    chunks = []
    for at in range(0, len(hidden), size):
        logits = head(hidden[at : at + size]).float()
        tokens = logits.argmax(-1)
        chosen = None if bitmask is None else greedy(masked(logits, bitmask[at : at + size]))
        nats, total = _nats_in_place(logits, targets[at : at + size])
        chunks.append((nats, tokens, *(chosen or (tokens, -total.log().squeeze(-1)))))
    nats, *rest = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Predictions(targets, nats.sum(), nats, *rest)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token for each row of logits, and its log-probability."""
    tokens = logits.argmax(-1)
    highest = logits.gather(-1, tokens.unsqueeze(-1)).float()
    # The largest is subtracted first: a probability near 1 keeps its digits.
    return tokens, -(logits.float() - highest).exp_().sum(-1).log()


def masked(logits: Tensor, bitmask: Tensor) -> Tensor:
    """The logits, -inf for tokens that the bitmask, shape (rows, numbers of 32 tokens), does not allow."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bitmask.to(logits.device)[:, :, None] >> bits & 1).flatten(1)[:, : logits.size(-1)].bool()
    return logits[:, : allowed.size(1)].masked_fill(~allowed, float("-inf"))


class _Loss(torch.autograd.Function):
    """Computes each chunk's gradient while its logits exist; `backward` scales it (as Liger, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Any, size: int, *trained: Tensor) -> Any:
        grads, nats = [], []
        trained_grads = [torch.zeros_like(p) for p in trained]
        for chunk, labels in zip(hidden.detach().split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                logits = head(chunk.requires_grad_())
            # The backward pass of a frozen head needs no logits, so they can be overwritten; a trained head's may.
            slopes = logits.detach().to(torch.float32, copy=bool(trained))
            chunk_nats, total = _nats_in_place(slopes, labels)
            nats.append(chunk_nats)
            # d loss / d logits = softmax - one-hot label
            slopes.div_(total)
            slopes.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), -torch.ones_like(slopes[:, :1]))
            slopes.masked_fill_((labels < 0).unsqueeze(-1), 0.0)
            grad, *head_grads = torch.autograd.grad(logits, [chunk, *trained], slopes.to(logits.dtype))
            grads.append(grad)
            for whole, part in zip(trained_grads, head_grads, strict=True):
                whole += part
        ctx.save_for_backward(torch.cat(grads), *trained_grads)
        all_nats = torch.cat(nats)
        ctx.mark_non_differentiable(all_nats)
        return all_nats.sum(), all_nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hidden, *trained = (saved * grad for saved in ctx.saved_tensors)
        return hidden, None, None, None, *trained


def _nats_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each label, 0 where it is -1, and each row's sum of exp(logit - largest); `logits` become these exps."""
    logits -= logits.amax(-1, keepdim=True)
    label_logits = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1))
    total = logits.exp_().sum(-1, keepdim=True)
    nats = (total.log() - label_logits).squeeze(-1)
    return nats.masked_fill(targets < 0, 0.0), total
