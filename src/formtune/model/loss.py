"""Next-token loss of the answers: logits exist at the predicting tokens alone, a bounded number of them at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Logits that exist at once: 32 MiB in float32 on a CPU, where the system hands out larger blocks anew each time, page
# by page. A GPU wants fewer and larger products.
LOGITS = {"cpu": 2**23 - 2**10, "cuda": 2**26}


@dataclass(slots=True)
class Predictions:
    """What a teacher-forced pass says of its targets, row after row.

    Args:
        targets: What was wanted, -1 where there is no target, shape (targets,).
        loss: Sum of `nats`, with a gradient where one was asked for.
        nats: Negative log-likelihood of each target, float32, shape (targets,); 0 where there is no target.
        tokens: The most likely tokens, shape (targets,); empty where a gradient was asked for.
    """

    targets: Tensor
    loss: Tensor
    nats: Tensor
    tokens: Tensor


def judge(head: nn.Module, hidden: Tensor, targets: Tensor, vocabulary: int) -> Predictions:
    """Judge the last hidden states of the predicting tokens.

    Args:
        head: Turns hidden states into logits; may have trained parameters.
        hidden: Shape (targets, width).
        targets: Token ids, -1 where there is none, shape (targets,).
        vocabulary: Number of logits per token.
    """
    size = max(1, LOGITS.get(hidden.device.type, 2**25) // vocabulary)
    if torch.is_grad_enabled():
        trained = [p for p in head.parameters() if p.requires_grad]
        loss, nats = _Loss.apply(hidden, targets, head, size, *trained)
        return Predictions(targets, loss, nats, targets.new_empty(0))
    judged = []
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head(part).float()
        tokens = logits.argmax(-1)
        judged.append((_nats_in_place(logits, wanted)[0], tokens))
    nats, tokens = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return Predictions(targets, nats.sum(), nats, tokens)


class _Loss(torch.autograd.Function):
    """Takes each chunk's gradient while its logits exist, so that they need be neither kept nor computed again.

    The gradient of a sum depends on what comes after it by a factor only (used so by Liger, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Any, size: int, *trained: Tensor) -> Any:
        grads, nats = [], []
        trained_grads = [torch.zeros_like(p) for p in trained]
        for part, wanted in zip(hidden.detach().split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                logits = head(part.requires_grad_())
            # A plain head's backward needs no logits; what a trained one saved of them is left alone.
            found = logits.detach().to(torch.float32, copy=bool(trained))
            loss, total = _nats_in_place(found, wanted)
            nats.append(loss)
            # d loss / d logits = softmax - one at the target
            found.div_(total)
            places = wanted.clamp_min(0).unsqueeze(-1)
            found.scatter_add_(-1, places, -torch.ones_like(found[:, :1]))
            found.masked_fill_((wanted < 0).unsqueeze(-1), 0.0)
            grad, *others = torch.autograd.grad(logits, [part, *trained], found.to(logits.dtype))
            grads.append(grad)
            for whole, other in zip(trained_grads, others, strict=True):
                whole += other
        ctx.save_for_backward(torch.cat(grads), *trained_grads)
        every = torch.cat(nats)
        ctx.mark_non_differentiable(every)
        return every.sum(), every

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        hidden, *trained = (saved * grad for saved in ctx.saved_tensors)
        return hidden, None, None, None, *trained


def _nats_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, 0 where it is -1, and each row's sum of exp(logit - largest); `logits` become these exps."""
    logits -= logits.amax(-1, keepdim=True)
    wanted = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1))
    total = logits.exp_().sum(-1, keepdim=True)
    nats = (total.log() - wanted).squeeze(-1)
    return nats.masked_fill(targets < 0, 0.0), total
