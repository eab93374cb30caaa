"""Bottlenecks between encoder and decoder in training: a Gaussian posterior, or vector quantisation.

Shapes: B images, C channels of the encoder's output, D channels of a code, Y and X latent height and width, K codes,
N = B * Y * X.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from transfusion_mot.codecs.mel_vq import MelVQModel

# The codebook is an average over about 1 / (1 - decay) steps.
_CODEBOOK_DECAY = 0.99
# A code that was unused for this number of steps is reset.
_DEAD_AFTER = 100


class Passed(NamedTuple):
    """Output of a bottleneck.

    Attributes:
        latents: Input of the decoder.
        penalty: Scalar that is added to the loss.
    """

    latents: Tensor
    penalty: Tensor


class Bottleneck(Protocol):
    """A part of the model in training; it collects its own numbers for the log."""

    def __call__(self, hidden: Tensor, generator: torch.Generator) -> Passed:
        """The encoder's output [B, C, Y, X], in float32 => the decoder's input, and a penalty."""
        ...

    def report(self) -> dict[str, float]:
        """Numbers for the log, over the steps since the last report."""
        ...


class GaussianBottleneck:
    """Latents are drawn from a Gaussian posterior; a KL term keeps it near the standard normal.

    Args:
        vae: An `AutoencoderKL` without quantisation layers.
        pixels: Number of values of an image.
        weight: Weight of the KL term.
    """

    def __init__(self, vae: AutoencoderKL, pixels: int, weight: float) -> None:
        self.pixels = pixels
        self.weight = weight
        self._kl = torch.zeros((), device=vae.device)

    def __call__(self, hidden: Tensor, generator: torch.Generator) -> Passed:
        """See `Bottleneck`; C is twice the channels of the latents, their mean and the logarithm of their variance."""
        posterior = DiagonalGaussianDistribution(hidden)
        noise = torch.randn(posterior.mean.shape, device=hidden.device, generator=generator)
        # Divided by the size of an image: the total is L1 + kl_weight * KL, both summed, at the scale of a mean.
        kl = posterior.kl().mean() / self.pixels
        self._kl = kl.detach()
        return Passed(posterior.mean + posterior.std * noise, self.weight * kl)

    def report(self) -> dict[str, float]:
        """The KL term of the last step, for each value of an image."""
        return {"kl": self._kl.item()}


class CodeBottleneck:
    """Each latent is replaced by the code with the highest cosine similarity (ViT-VQGAN, arXiv 2110.04627, 3.2).

    Codes have length one. Then the nearest code to a vector does not depend on the length of the vector, so that a
    plain `VQModel` finds the same code as training. Codes are moving averages of the vectors assigned to them (VQ-VAE,
    arXiv 1711.00937, appendix A.1). An unused code is reset to a vector of the batch, drawn as in k-means++: with a
    probability proportional to its squared distance from its code.

    Args:
        model: Its `quantize.embedding` is the codebook, which every call changes in place.
        weight: Weight of the commitment term (beta in VQ-VAE).
        is_new: Whether the codebook is untrained: then all codes start as vectors of the first batch.
        decay: Decay of the moving averages.
        dead_after: A code is reset after this number of calls without use.
    """

    def __init__(
        self,
        model: VQModel | MelVQModel,
        weight: float,
        *,
        is_new: bool = True,
        decay: float = _CODEBOOK_DECAY,
        dead_after: int = _DEAD_AFTER,
    ) -> None:
        self.model = model
        self.weight = weight
        self.decay = decay
        self.dead_after = dead_after
        self.codebook: Tensor = model.quantize.embedding.weight.requires_grad_(False)
        self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self.sums = self.codebook.clone()
        self.unused = torch.full_like(self.codebook[:, 0], dead_after if is_new else 0, dtype=torch.long)
        self._counts = torch.zeros_like(self.unused)
        self._commitment = torch.zeros((), device=self.codebook.device)

    def __call__(self, hidden: Tensor, generator: torch.Generator) -> Passed:
        """See `Bottleneck`."""
        vectors_BDYX = F.normalize(self.model.quant_conv(hidden).float(), dim=1)
        shape = vectors_BDYX.movedim(1, -1).shape
        vectors_ND = vectors_BDYX.movedim(1, -1).reshape(-1, shape[-1])
        codes_N = (vectors_ND.detach() @ self.codebook.T).argmax(dim=1)
        chosen_BDYX = self.codebook[codes_N].view(shape).movedim(-1, 1)
        commitment = F.mse_loss(vectors_BDYX, chosen_BDYX)
        # Straight-through gradient: the decoder reads the code, and its gradient goes to the vector.
        latents = vectors_BDYX + (chosen_BDYX - vectors_BDYX).detach()
        self._commitment = commitment.detach()
        self._update(vectors_ND.detach(), codes_N, generator)
        return Passed(self.model.post_quant_conv(latents), self.weight * commitment)

    def _update(self, vectors_ND: Tensor, codes_N: Tensor, generator: torch.Generator) -> None:
        counts_K = torch.bincount(codes_N, minlength=len(self.codebook))
        self._counts += counts_K
        self.unused = torch.where(counts_K > 0, 0, self.unused + 1)
        added = torch.zeros_like(self.sums).index_add_(0, codes_N, vectors_ND)
        self.sums.mul_(self.decay).add_(added, alpha=1 - self.decay)
        distances_N = (vectors_ND - self.codebook[codes_N]).square().sum(dim=1)
        # A draw for every code, dead or not, so that the host need not know which codes are dead.
        drawn = (distances_N + 1e-9).multinomial(len(self.sums), replacement=True, generator=generator)
        is_dead = self.unused >= self.dead_after
        self.sums = torch.where(is_dead[:, None], vectors_ND[drawn], self.sums)
        self.unused = torch.where(is_dead, 0, self.unused)
        self.codebook.copy_(F.normalize(self.sums, dim=1))

    def report(self) -> dict[str, float]:
        """The commitment loss of the last step, and the use of codes since the last report."""
        use, perplexity = codebook_use(self._counts)
        self._counts.zero_()
        return {"commitment": self._commitment.item(), "codebook_use": use, "perplexity": perplexity}


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Counts of K codes [K] => the share of used codes, and the perplexity of their use.

    The perplexity is the exponential of the entropy: the number of equally frequent codes with the same entropy.
    """
    shares = counts.double() / counts.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
