"""Overlap of two sets of feature vectors: precision, recall, density, coverage.

A set's manifold is the union of balls around its vectors that reach to their k-th nearest neighbour.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.row_blocks import row_blocks

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True)
class ManifoldScores:
    """Overlap of the manifolds of generated and real images.

    Attributes:
        precision: Share of generated images inside the real manifold, k = 3 (Kynkaanniemi et al., arXiv 1904.06991).
        recall: Share of real images inside the generated manifold, k = 3.
        density: Mean number of real balls, k = 5, around a generated image, over k (Naeem et al., arXiv 2002.09797);
            it may exceed 1.
        coverage: Share of real images whose ball, k = 5, holds a generated one.
        inside: `[N]` bool, which generated images are inside the real manifold; the mean is the precision.
        covered: `[N]` bool, which real balls hold a generated image; the mean is the coverage.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    inside: Tensor
    covered: Tensor


def manifold_scores(real: Tensor, generated: Tensor) -> ManifoldScores:
    """Compare real features `[N1, D]` with generated ones `[N2, D]`, on their device, in float64.

    Raises:
        UserError: A side has too few vectors for the nearest neighbours.
    """
    smallest = min(len(real), len(generated))
    if smallest <= DENSITY_NEIGHBOURS:
        raise UserError(
            f"precision, recall, density and coverage need more than {DENSITY_NEIGHBOURS} images on each side, "
            f"but one side has {smallest}"
        )
    # Centring does not change distances and reduces rounding errors.
    centre = real.double().mean(dim=0)
    real, generated = real.double() - centre, generated.double() - centre
    real_radii, generated_radii = _squared_radii(real), _squared_radii(generated)
    in_balls = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    inside = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled, covered = [], []
    for rows in row_blocks(len(real), len(generated)):
        squared = _squared_distances(real[rows], generated)
        inside |= (squared <= real_radii[0, rows, None]).any(dim=0)
        recalled.append((squared <= generated_radii[0]).any(dim=1))
        # The papers' code has <= for the first two and < for the others.
        in_ball = squared < real_radii[1, rows, None]
        in_balls += in_ball.sum(dim=0)
        covered.append(in_ball.any(dim=1))
    all_covered = torch.cat(covered)
    return ManifoldScores(
        precision=inside.double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        density=in_balls.double().mean().item() / DENSITY_NEIGHBOURS,
        coverage=all_covered.double().mean().item(),
        inside=inside,
        covered=all_covered,
    )


def _squared_radii(features: Tensor) -> Tensor:
    """[2, N] squared distance of each vector to its 3rd and 5th nearest neighbour in its set."""
    radii = []
    for rows in row_blocks(len(features), len(features)):
        # The nearest vector is the vector itself.
        nearest = _squared_distances(features[rows], features).topk(DENSITY_NEIGHBOURS + 1, largest=False).values
        radii.append(nearest[:, [PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS]])
    return torch.cat(radii).T


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Features `[N, D]` and `[M, D]` => `[N, M]`."""
    products = x @ y.T
    return products.mul_(-2).add_((x**2).sum(dim=1)[:, None]).add_((y**2).sum(dim=1)).clamp_(min=0)
