"""The whole model: text and images in, next-token logits and image predictions out.

Shapes: B rows, T text slots, K images a row, P patches an image, S = T + K*P, D width, V vocabulary, C latent channels,
Y and X latent height and width.

Initialisation (`initialise`; the values of a module come from the seed and its name alone):

| parameters | values |
| --- | --- |
| token embedding, text head, matrices of the blocks | normal, standard deviation 0.02 (Llama) |
| block matrices whose output is added to the residual stream | normal, 0.02 / sqrt(2 * num_layers) (GPT-2) |
| last layer of the image adapter | zero, so that training starts from the mean prediction |
| norms | one |
| rest of the image adapter | as torch and diffusers set it |
"""

import copy
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion_mot.config import ModelConfig, TowerConfig, to_dict
from transfusion_mot.errors import UserError
from transfusion_mot.losses import text_loss_sum
from transfusion_mot.models.adapters import LinearAdapter, UNetAdapter
from transfusion_mot.models.attention import (
    CacheWindow,
    Kernel,
    KernelChoice,
    SlotIds,
    attention_kernel,
    runs_on_hopper,
    training_mask,
)
from transfusion_mot.models.layers import RMSNorm, rotary_angles
from transfusion_mot.models.mot import Checkpointing, MoTBlock, Streams, TowerModules, check_architecture

# Standard deviation of embedding, head and block matrices.
INIT_STD = 0.02

# What torch and diffusers initialise draws from torch's one generator.
_GLOBAL_GENERATOR = threading.Lock()


class TransfusionOutput(NamedTuple):
    """Predictions of both modalities.

    Attributes:
        logits: [B, T, V], the next token at every text slot; None without text, or where `text_loss` is asked for.
        prediction: [B, K, C, Y, X], the network's side of the diffusion loss; None without images.
        text_loss: [], cross-entropy in nats summed over labelled text slots; None without labels.
        text_losses: [B, T], its terms, without gradient; None without labels.
    """

    logits: Tensor | None
    prediction: Tensor | None
    text_loss: Tensor | None
    text_losses: Tensor | None


class TransfusionMoT(ModelMixin, ConfigMixin):
    """One transformer over text tokens and noisy image patches, with a tower of weights per modality.

    Args:
        vocab_size: Token ids, special ones included.
        latent_channels: Channels of the autoencoder's latents.
        architecture: The fields of `ModelConfig`.
    """

    # Which kernel computes attention in training; all give the same numbers, so it is no part of the architecture.
    attention: KernelChoice = "auto"

    # Where accelerate cuts the model to shard it, and diffusers to spread it over devices.
    _no_split_modules = ["MoTBlock"]  # noqa: RUF012
    # What `compile_repeated_blocks` of diffusers compiles, for sampling.
    _repeated_blocks = ["MoTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(self, vocab_size: int, latent_channels: int, architecture: dict[str, Any]) -> None:
        super().__init__()
        towers = {name: TowerConfig(**sizes) for name, sizes in architecture["towers"].items()}
        self.architecture = config = ModelConfig(**{**architecture, "towers": towers})
        check_architecture(config)
        text_size = towers[config.modalities["text"]].hidden_size
        image_size = towers[config.modalities["image"]].hidden_size
        self.token_embedding = nn.Embedding(vocab_size, text_size)
        if config.image_adapter == "linear":
            self.image_adapter: LinearAdapter | UNetAdapter = LinearAdapter(
                latent_channels, image_size, config.patch_size
            )
        else:
            self.image_adapter = UNetAdapter(
                latent_channels, image_size, config.patch_size, config.unet_channels, config.unet_num_layers
            )
        self.blocks = nn.ModuleList(MoTBlock(config) for _ in range(config.num_layers))
        self.final_norm = TowerModules(config, "norm", lambda tower: RMSNorm(tower.hidden_size, config.norm_eps))
        self.text_head = nn.Linear(text_size, vocab_size, bias=False)
        # Drawn on the CPU whatever torch's default device is.
        self.initialise(int(torch.randint(2**62, (), device="cpu")))

    @classmethod
    def from_config_section(cls, vocab_size: int, latent_channels: int, config: ModelConfig) -> "TransfusionMoT":
        """Build a model from its section of the run's configuration."""
        return cls(vocab_size=vocab_size, latent_channels=latent_channels, architecture=to_dict(config))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load config.json and safetensors as diffusers does, but refuse weights that do not match the model.

        Raises:
            UserError: Parameters are missing from the file, or the file has others; the message lists them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:  # what diffusers raises for another shape
            raise UserError(f"{args[0]} does not hold this model's weights: {' '.join(str(error).split())}") from None
        problems = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
        if problems:
            raise UserError(
                f"{args[0]} does not hold this model's weights: {problems}; use the folder of another model"
            )
        return (model, info) if wants_info else model

    def checkpoint_activations(self, checkpointing: Checkpointing) -> None:
        """Say what the backward pass of a block finds: everything, the results of matrix products and attention
        (`selective`), or the block's input alone (`full`). The rest it computes again. Before `compile_blocks`."""
        for block in self.blocks:
            cast(MoTBlock, block).checkpointing = checkpointing

    def compile_blocks(self) -> None:
        """Compile the transformer blocks in place, once for all of them; for CUDA devices.

        Not the whole model: that takes 4 % off a step at 163M, and 100 s instead of 30 to the first one
        (benchmarks/README.md).
        """
        for block in self.blocks:
            block.forward = _compiled_in_training(block.forward)

    def kernel(self, device: torch.device, num_slots: int) -> tuple[Kernel, str]:
        """The kernel of attention without a cache for rows of so many slots, and why; depends on autocast.

        Raises:
            UserError: See `attention_kernel`.
        """
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else self.text_head.weight.dtype
        head_dim, on_hopper = self.architecture.head_dim, runs_on_hopper(device)
        return attention_kernel(self.attention, device.type, num_slots, head_dim, dtype, on_hopper)

    def initialise(self, seed: int) -> None:
        """Draw all weights.

        A module's come from the seed and its name, and are drawn on the CPU, a few modules at a time: they are the same
        on every device and however they are sharded, and no process ever holds all that are sharded.
        """
        if self.token_embedding.weight.is_meta:
            return
        owners = [(name, module) for name, module in self.named_modules() if list(module.parameters(recurse=False))]
        # One thread draws 10^8 numbers a second, of which a model of the papers has up to 10^10.
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(owners), threads):
                some = owners[start : start + threads]
                copies = pool.map(functools.partial(self._draw, seed), *zip(*some, strict=True))
                for (_, module), drawn in zip(some, copies, strict=True):
                    for key, parameter in module.named_parameters(recurse=False):
                        _fill(parameter, drawn.get_parameter(key))

    # Entered by each thread: whether gradients are recorded is a thread's own.
    @torch.no_grad()
    def _draw(self, seed: int, name: str, module: nn.Module) -> nn.Module:
        """A copy of one module, whole and on the CPU, with initial weights."""
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        number = int.from_bytes(digest[:8], "little") >> 1
        drawn: Any = copy.copy(module)
        drawn._parameters = {
            key: nn.Parameter(torch.empty(parameter.shape, device="cpu"))
            for key, parameter in module.named_parameters(recurse=False)
        }
        is_matrix = name.startswith("blocks.") and isinstance(drawn, nn.Linear)
        if is_matrix or name in ("token_embedding", "text_head"):
            to_residual = is_matrix and (".output." in name or name.endswith(".down"))
            std = INIT_STD / math.sqrt(2 * len(self.blocks)) if to_residual else INIT_STD
            nn.init.normal_(drawn.weight, std=std, generator=torch.Generator().manual_seed(number))
        elif name == f"image_adapter.{self.image_adapter.last_layer}":
            for parameter in drawn.parameters():
                nn.init.zeros_(parameter)
        else:
            with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(number)
                drawn.reset_parameters()
        return cast(nn.Module, drawn)

    def forward(
        self,
        text_ids: Tensor | None,
        noisy_latents: Tensor | None,
        timesteps: Tensor | None,
        document_ids: Tensor | None,
        order: Tensor | None,
        span_ids: Tensor | None,
        rope_positions: Tensor,
        text_labels: Tensor | None = None,
        cache: CacheWindow | None = None,
        z_loss_weight: float = 0.0,
        copies: Tensor | None = None,
    ) -> TransfusionOutput:
        """Predict the next token of every text slot and the diffusion target of every image.

        Args:
            text_ids: [B, T], or None where there is no text.
            noisy_latents: [B, K, C, Y, X], or None where there are no images.
            timesteps: [B, K] in [0, 1], one per image.
            document_ids, order, span_ids: [B, S], see `SlotIds`; text slots first, then the patches of each image. None
                with a cache.
            rope_positions: [B, S] or [B, S, 3].
            text_labels: [B, T], the next token or `IGNORE_INDEX`: gives `text_loss` in place of `logits`, which for a
                large vocabulary would be most of the memory of a training step.
            cache: While sampling, what earlier calls left; new slots, of one modality in each call, attend to it too.
                Of text there are then only the logits of the last slot, [B, 1, V].
            z_loss_weight: Of the gradient of `text_loss`, see `text_loss_sum`.
            copies: [B, K] bool, see `SlotIds.from_spans`.
        """
        config = self.architecture
        embedded: dict[str, Tensor] = {}
        if text_ids is not None:
            embedded["text"] = self.token_embedding(text_ids)
        kept: tuple[Tensor, ...] = ()
        if noisy_latents is not None and timesteps is not None:
            tokens, kept = self.image_adapter.embed(noisy_latents.flatten(0, 1), timesteps.flatten())
            embedded["image"] = tokens.unflatten(0, noisy_latents.shape[:2]).flatten(1, 2)
        mask = None
        if cache is None:
            assert document_ids is not None
            assert order is not None
            assert span_ids is not None
            if config.image_attention == "causal":
                assert copies is None
                span_ids = torch.full_like(span_ids, -1)
            slots = SlotIds.from_spans(document_ids, order, span_ids, copies)
            mask = training_mask(slots, self.kernel(order.device, order.shape[1])[0])
        rotary = rotary_angles(rope_positions, config.head_dim, config.rope_theta)
        # Under autocast the residual stream has its number format, not that of the embedding.
        device_type = rope_positions.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            embedded = {modality: hidden.to(dtype) for modality, hidden in embedded.items()}
        streams = self._to_streams(embedded)
        for layer, block in enumerate(self.blocks):
            streams = block(streams, rotary, mask, None if cache is None else cache.layer(layer))
        hidden = self._from_streams(streams, embedded)
        logits, text_loss, text_losses = None, None, None
        if "text" in hidden and text_labels is not None:
            text_loss, text_losses = text_loss_sum(hidden["text"], self.text_head.weight, text_labels, z_loss_weight)
        elif "text" in hidden:
            logits = self.text_head(hidden["text"] if cache is None else hidden["text"][:, -1:])
        prediction = None
        if noisy_latents is not None:
            images = hidden["image"].unflatten(1, (noisy_latents.shape[1], -1)).flatten(0, 1)
            height, width = noisy_latents.shape[-2:]
            prediction = self.image_adapter.predict(images, kept, height, width).view(noisy_latents.shape)
        return TransfusionOutput(logits, prediction, text_loss, text_losses)

    def _to_streams(self, embedded: dict[str, Tensor]) -> Streams:
        """Join the modalities of each tower into its stream."""
        parts: dict[str, list[Tensor]] = {}
        for modality, hidden in embedded.items():
            parts.setdefault(self.architecture.modalities[modality], []).append(hidden)
        return {tower: hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1) for tower, hidden in parts.items()}

    def _from_streams(self, streams: Streams, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the final norms and cut the streams back into modalities."""
        normed = {tower: self.final_norm[tower](hidden) for tower, hidden in streams.items()}
        result = {}
        for modality, tokens in embedded.items():
            tower, length = self.architecture.modalities[modality], tokens.shape[1]
            result[modality], normed[tower] = normed[tower].split([length, normed[tower].shape[1] - length], dim=1)
        return result


def _compiled_in_training(forward: Callable[..., Streams]) -> Callable[..., Streams]:
    """The forward of a block, compiled where gradients are asked for.

    Its forward alone: the hooks around it, with which FSDP gathers weights, are not for the compiler. Sampling has a
    shape for every length, each of which would be compiled anew.
    """
    compiled = torch.compile(forward, fullgraph=True, dynamic=False)

    @functools.wraps(forward)
    def choose(*args: Any, **kwargs: Any) -> Streams:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return choose


@torch.no_grad()
def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a tensor, or this process's shard of it, into a parameter."""
    if isinstance(parameter, DTensor):
        # Each process has drawn the same: nothing has to be sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        shards = distribute_tensor(whole.detach().to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.to_local().copy_(shards.to_local())
    else:
        parameter.copy_(whole)
