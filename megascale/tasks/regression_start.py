"""A linear layer by logistic regression, so that fine-tuning begins where a linear probe ends.

A classifier of random weights spoils pretrained features with its first gradients. (Kumar et al. 2022, "Fine-Tuning can
Distort Pretrained Features and Underperform Out-of-Distribution") scikit-learn's, which the baselines use, knows neither
GPUs nor several labels a window.

N windows, D width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_ITERATIONS = 1000  # where it has not converged by then, it is a little more penalised than it says
_STILL = 1e-6  # of a feature's mean: what fp32 rounds off


def fit_linear(x_ND: Tensor, targets: Tensor, num_classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Return weight_CD and bias_C of the linear layer that minimises strength x loss + half the squared weights.

    The loss is the sum over windows of cross-entropy, or of binary cross-entropies over classes; weights are those of
    standardised features, and what is returned takes them as they are.

    Args:
        x_ND: features, float.
        targets: class numbers (N,), int64, or labels (N, C), float.
        num_classes: C.
        strength: the inverse of the penalty, as scikit-learn's `C`.
    """
    x_ND, dtype = x_ND.double(), x_ND.dtype  # L-BFGS stalls on fp32's rounding
    targets = targets.double() if targets.ndim == 2 else targets
    mean_D, scale_D = x_ND.mean(dim=0), x_ND.std(dim=0, correction=0)
    scale_D = torch.where(scale_D > _STILL * mean_D.abs(), scale_D, 1.0)  # a feature that never changes tells nothing
    standard_ND = (x_ND - mean_D) / scale_D
    weight_CD = x_ND.new_zeros(num_classes, x_ND.shape[1], requires_grad=True)
    bias_C = x_ND.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits_NC = F.linear(standard_ND, weight_CD, bias_C)
        if targets.ndim == 1:
            loss = F.cross_entropy(logits_NC, targets, reduction="sum")
        else:
            loss = F.binary_cross_entropy_with_logits(logits_NC, targets, reduction="sum")
        total = loss + weight_CD.square().sum() / (2 * strength)
        total = total / len(x_ND)  # so that L-BFGS' tolerances mean the same for any N
        total.backward()
        return total

    optimizer.step(objective)
    weight_CD, bias_C = weight_CD.detach() / scale_D, bias_C.detach()
    return weight_CD.to(dtype), (bias_C - weight_CD @ mean_D).to(dtype)
