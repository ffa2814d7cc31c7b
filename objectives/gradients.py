"""Gradients of a segmentation loss in the segmenter's parameters, as flat vectors."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from errors import InputError


def last_parameters(network: nn.Module) -> list[str]:
    """Return the names of the parameters of the module that was registered last: the output layer."""
    names = [name for name, _ in network.named_parameters()]
    module = names[-1].rpartition(".")[0]
    return [name for name in names if name.rpartition(".")[0] == module]


def parameter_gradient(
    network: nn.Module,
    image: Tensor,
    mask: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return ∇_ϑ of the batch's mean loss, flattened: ``(P,)``, without a graph.

    Give a batch of one for the gradient of a sample. The network may be frozen and stays as it is; it
    must be in eval mode, so that its output is one tensor of logits. Parameters that the output does
    not depend on have gradient 0. In float32 under mixed precision too: autocast would keep a copy in half
    precision of all parameters, anew for every gradient.

    Args:
        network: f_ϑ, images to logits.
        image: ``(B, C, H, W)`` in [−1, 1].
        mask: int64 ``(B, H, W)``.
        loss: of (logits, mask), one value a sample ``(B,)``; see :mod:`objectives.rewards`.
        names: which parameters, in this order; None takes all.

    Raises:
        InputError: called where PyTorch keeps no gradients whatever is asked.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("gradients are needed here: set --trainer.inference_mode=false")
    known = dict(network.named_parameters())
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        chosen = {name: known[name].detach().requires_grad_() for name in (names or known)}
        logits = functional_call(network, chosen, (image.detach().float(),))
        value = loss(logits.float(), mask).mean()
        gradients = torch.autograd.grad(value, list(chosen.values()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return cos ∠(a, b), a scalar in [−1, 1], of two vectors ``(P,)``; 0 if one of them is 0."""
    tiny = torch.finfo(torch.float64).tiny
    first, second = (F.normalize(vector.double(), dim=0, eps=tiny) for vector in (a, b))
    return (first @ second).clamp(-1, 1).to(a.dtype)
