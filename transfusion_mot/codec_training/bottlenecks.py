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

# The codebook is an average of about so many steps: 1 / (1 - decay).
_CODEBOOK_DECAY = 0.99
# A code that no image of so many steps has used begins again.
_DEAD_AFTER = 100


class Passed(NamedTuple):
    """Output of a bottleneck.

    Attributes:
        latents: What the decoder is given.
        penalty: Scalar that is added to the loss.
    """

    latents: Tensor
    penalty: Tensor


class Bottleneck(Protocol):
    """A part of the model in training; it keeps what the log says of it."""

    def __call__(self, hidden: Tensor, generator: torch.Generator) -> Passed:
        """The encoder's output [B, C, Y, X], in float32 => what the decoder is given, and a penalty."""
        ...

    def report(self) -> dict[str, float]:
        """Numbers for the log, over the steps since the last report."""
        ...


class GaussianBottleneck:
    """Latents are drawn from a Gaussian posterior, which a KL term holds near the standard normal.

    Args:
        vae: An `AutoencoderKL` without quantisation layers.
        pixels: Number of values of an image.
        weight: Of the KL term.
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
    """Each latent becomes the code that points most nearly in its direction (ViT-VQGAN, arXiv 2110.04627, section 3.2).

    Codes have length one. The nearest of them to a vector is then the same whether the vector is brought to length one
    or not, so that a plain `VQModel` finds the code that training found. They follow the mean of the vectors that took
    them (VQ-VAE, arXiv 1711.00937, appendix A.1). A code that no vector takes any more begins again at a vector of the
    batch, drawn as k-means++ does: the further from its own code, the likelier.

    Args:
        model: Its `quantize.embedding` is the codebook, which this changes in place in every call.
        weight: Of the commitment term (beta there).
        is_new: Whether the codebook has learnt nothing yet: then all codes begin at vectors of the first batch.
        decay: Of the averages that the codes follow.
        dead_after: Calls in which a code was not used, after which it begins again.
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
        # The decoder sees the code; its gradient goes to the vector as if they were the same.
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
        # A draw for every code, dead or not: which ones are dead stays on the device.
        drawn = (distances_N + 1e-9).multinomial(len(self.sums), replacement=True, generator=generator)
        is_dead = self.unused >= self.dead_after
        self.sums = torch.where(is_dead[:, None], vectors_ND[drawn], self.sums)
        self.unused = torch.where(is_dead, 0, self.unused)
        self.codebook.copy_(F.normalize(self.sums, dim=1))

    def report(self) -> dict[str, float]:
        """The commitment of the last step, and how the codes were used since the last report."""
        use, perplexity = codebook_use(self._counts)
        self._counts.zero_()
        return {"commitment": self._commitment.item(), "codebook_use": use, "perplexity": perplexity}


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """How often each of K codes was used [K] => the share of codes that were, and the perplexity of their use.

    The perplexity is the exponential of the entropy: the number of codes that would be as many choices if all were used
    equally often.
    """
    shares = counts.double() / counts.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
