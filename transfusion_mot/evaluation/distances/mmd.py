"""Kernel distances between two sets of feature vectors: squared maximum mean discrepancies over all pairs.

Pairs are computed in blocks of rows, in float64 on the device of the features, so that 30,000 x 30,000 pairs fit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.row_blocks import row_blocks

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KernelDistance:
    """A squared maximum mean discrepancy and its standard error.

    The error is of first order, from the contributions of single images; it is too small if both sets have the same
    distribution.
    """

    value: float
    standard_error: float


def kernel_distance(first: Tensor, second: Tensor) -> KernelDistance:
    """Kernel distance of features `[N1, D]` and `[N2, D]` (KID; arXiv 1801.01401, section 3).

    The unbiased estimate with the kernel (x.y / D + 1)^3 over all pairs. Other implementations estimate it by means
    over random subsets.

    Raises:
        UserError: A set has fewer than two vectors.
    """
    num_features = first.shape[1]
    return _squared_mmd(first, second, lambda x, y: (x @ y.T / num_features + 1) ** 3, unbiased=True)


def gaussian_distance(first: Tensor, second: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> KernelDistance:
    """CMMD (arXiv 2401.09603): distance under the kernel exp(-|x - y|^2 / 2 sigma^2), times `scale`.

    As published, the estimate includes the pair of each vector with itself. Features `[N1, D]` and `[N2, D]` are first
    normalised to length one.

    Raises:
        UserError: A set has fewer than two vectors.
    """
    first, second = (torch.nn.functional.normalize(features.double(), dim=1) for features in (first, second))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # |x - y|^2 = 2 - 2 x.y
        return torch.exp((x @ y.T - 1) / sigma**2)

    distance = _squared_mmd(first, second, kernel, unbiased=False)
    return KernelDistance(scale * distance.value, scale * distance.standard_error)


def _squared_mmd(first: Tensor, second: Tensor, kernel: Kernel, unbiased: bool) -> KernelDistance:
    smallest = min(len(first), len(second))
    if smallest < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, but one side has {smallest}")
    within_first = _mean_to_others(first, kernel, unbiased)
    within_second = _mean_to_others(second, kernel, unbiased)
    to_second, to_first = _means_between(first, second, kernel)
    value = within_first.mean() + within_second.mean() - 2 * to_second.mean()
    # Hajek's projection of the U-statistic.
    variance = 4 * (within_first - to_second).var() / len(first) + 4 * (within_second - to_first).var() / len(second)
    return KernelDistance(value.item(), variance.sqrt().item())


def _mean_to_others(features: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """[N] mean kernel of each vector with all vectors of its set; `unbiased` excludes the vector itself."""
    means = []
    everything = features.double()
    for rows in row_blocks(len(features), len(features)):
        block = kernel(everything[rows], everything)
        total = block.sum(dim=1)
        if unbiased:
            total -= block.diagonal(offset=rows.start)
        means.append(total / (len(features) - unbiased))
    return torch.cat(means)


def _means_between(first: Tensor, second: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """[N1] and [N2] mean kernel of each vector with all vectors of the other set."""
    to_second = []
    to_first = torch.zeros(len(second), dtype=torch.float64, device=second.device)
    other = second.double()
    for rows in row_blocks(len(first), len(second)):
        block = kernel(first[rows].double(), other)
        to_second.append(block.mean(dim=1))
        to_first += block.sum(dim=0)
    return torch.cat(to_second), to_first / len(first)
