"""The whole model: slots of every modality => losses or predictions of each.

Shapes: B rows, T token slots of a modality, K images a row, S all slots of a row, D width, V vocabulary, C latent
channels, Y and X latent height and width.

Initialisation (`initialise`; the values of a module come from the seed and its name alone):

| parameters | values |
| --- | --- |
| token embeddings, heads, matrices of the blocks | normal, standard deviation 0.02 (Llama) |
| block matrices whose output is added to the residual stream | normal, 0.02 / sqrt(2 * num_layers) (GPT-2) |
| last layer of a patch adapter | zero, so that training starts from the mean prediction |
| norms | one |
| biases of the blocks | zero |
| rest of a patch adapter | as torch and diffusers set it |
| low-rank adapters | the first matrix as torch sets it, the second zero (LoRA, section 4.1) |
"""

import copy
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion_mot.config import ORIGINS, TEXT, DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig, to_dict
from transfusion_mot.cores import usable_cores
from transfusion_mot.errors import UserError
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.attention import (
    CacheWindow,
    Kernel,
    KernelChoice,
    attention_kernel,
    runs_on_hopper,
    slot_ids,
    training_mask,
)
from transfusion_mot.models.inputs import ModalityInput, Slots, TokenInput
from transfusion_mot.models.layers import RMSNorm, attention_factor, rotary_angles, unturned_angles
from transfusion_mot.models.modalities import (
    DiffusionModality,
    InitialValues,
    Modality,
    ReadModality,
    Terms,
    TokenModality,
)
from transfusion_mot.models.mot import (
    Checkpointing,
    MoTBlock,
    Streams,
    TowerModules,
    eager_norm,
)

# Standard deviation of embedding, head and block matrices.
INIT_STD = 0.02

# What torch and diffusers initialise draws from torch's one generator.
_GLOBAL_GENERATOR = threading.Lock()


class TransfusionOutput(NamedTuple):
    """Outputs of the model, by modality.

    Attributes:
        terms: Losses of the modalities whose input has labels or noise.
        predictions: For the others: logits [B, T, V] of the next token, or the diffusion prediction [B, K, C, Y, X].
    """

    terms: dict[str, Terms]
    predictions: dict[str, Tensor]


def check_model(config: ModelConfig) -> None:
    """Refuse what `check_architecture` refuses, and names and rotary positions that torch and transformers refuse.

    Raises:
        UserError: Names the key, its value and the valid values.
    """
    for key, names in (("towers", config.towers), ("modalities", config.modalities)):
        for name in names:
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(
                    f"model.{key} has the name '{name}', which torch does not allow for weights; give another one"
                )
    check_architecture(config)
    scaling = config.rope_scaling
    if scaling is not None:
        try:
            attention_factor(config.head_dim, config.rope_theta, scaling)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.rope_scaling is {scaling}, which transformers cannot read ({error!r})") from None


class TransfusionMoT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """One transformer over several modalities, each with a tower of weights, an objective and codes or latents.

    Args:
        sizes: For each generated modality the size from its codec or tokenizer: the vocabulary size (`next_token`) or
            the number of latent channels (`diffusion`).
        architecture: The fields of `ModelConfig`.
        diffusion: The fields of `DiffusionConfig`, the objective of the modalities with `diffusion`.
    """

    # The attention kernel of training. All kernels give the same numbers, so it is not part of the architecture.
    attention: KernelChoice = "auto"

    # The units by which accelerate shards the model and diffusers distributes it over devices.
    _no_split_modules = ["MoTBlock"]  # noqa: RUF012
    # The blocks that `compile_repeated_blocks` of diffusers compiles for sampling.
    _repeated_blocks = ["MoTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(self, sizes: dict[str, int], architecture: dict[str, Any], diffusion: dict[str, Any]) -> None:
        super().__init__()
        towers = {name: TowerConfig(**fields) for name, fields in architecture["towers"].items()}
        modalities = {name: ModalityConfig(**fields) for name, fields in architecture["modalities"].items()}
        self.architecture = config = ModelConfig(**{**architecture, "towers": towers, "modalities": modalities})
        check_model(config)
        self.modalities = nn.ModuleDict()
        for name in config.stream_order:
            modality = config.modalities[name]
            width = towers[modality.tower].hidden_size
            if modality.objective == "next_token":
                self.modalities[name] = TokenModality(sizes[name], width, modality.tied_embeddings)
            elif modality.objective == "read":
                self.modalities[name] = ReadModality(sizes[config.content_of(name)], width, modality)
            else:
                self.modalities[name] = DiffusionModality(sizes[name], width, modality, DiffusionConfig(**diffusion))
        self.blocks = nn.ModuleList(MoTBlock(config) for _ in range(config.num_layers))
        self.final_norm = TowerModules(
            config, "norm", lambda tower: RMSNorm(towers[tower].hidden_size, config.norm_eps_of(tower))
        )
        # Drawn on the CPU, with any default device of torch.
        self.initialise(int(torch.randint(2**62, (), device="cpu")))

    @classmethod
    def from_sections(cls, sizes: dict[str, int], model: ModelConfig, diffusion: DiffusionConfig) -> "TransfusionMoT":
        """Build a model from its sections of the run's configuration; of text with at least the rows that they say."""
        sizes = {**sizes, TEXT: max(sizes[TEXT], model.modalities[TEXT].vocab_size or 0)}
        architecture = to_dict(model)
        for tower in architecture["towers"].values():
            # The origin of weights is not part of the model.
            tower.update(dict.fromkeys(ORIGINS))
        return cls(sizes=sizes, architecture=architecture, diffusion=to_dict(diffusion))

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Build a model from the dict of its config.json, as diffusers does.

        Raises:
            UserError: It is of version 0.1.
        """
        if "latent_channels" in config:
            raise UserError(
                "the transformer is of version 0.1; convert its snapshot: python -m transfusion_mot.sampling.convert "
                "OLD_FOLDER NEW_FOLDER"
            )
        return super().from_config(config, **kwargs)

    def modality(self, name: str) -> Modality:
        """The module of a generated modality."""
        return cast(Modality, self.modalities[name])

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load config.json and safetensors as diffusers does, but refuse weights that do not match the model.

        Raises:
            UserError: Parameters are missing from the file, or the file has others; the message lists them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # what diffusers raises for another shape
            raise UserError(f"{args[0]} does not hold this model's weights: {' '.join(str(error).split())}") from None
        problems = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
        if problems:
            raise UserError(
                f"{args[0]} does not hold this model's weights: {problems}; use the folder of another model"
            )
        return (model, info) if wants_info else model

    def checkpoint_activations(self, checkpointing: Checkpointing) -> None:
        """Set what a block keeps for its backward pass: everything, the results of matrix products and attention
        (`selective`), or only the block's input (`full`). The rest is computed again. Call it before
        `compile_blocks`."""
        for block in self.blocks:
            cast(MoTBlock, block).checkpointing = checkpointing

    def insulate(self, towers: Sequence[str]) -> None:
        """Let other towers read these towers' keys and values without sending gradients. Call before
        `compile_blocks`."""
        for block in self.blocks:
            cast(MoTBlock, block).insulated = tuple(towers)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks in place, once for all of them; for CUDA devices.

        Compiling the whole model would save 4 % of a step at 163M, but the first step would take 100 s instead of 30
        (benchmarks/tried.md).
        """
        for block in self.blocks:
            block.forward = _compiled_in_training(block.forward)

    def kernel(self, device: torch.device, num_slots: int) -> tuple[Kernel, str]:
        """The attention kernel without a cache for rows of this length, and the reason; depends on autocast.

        Raises:
            UserError: See `attention_kernel`.
        """
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else next(self.modality(TEXT).parameters()).dtype
        head_dim, on_hopper = self.architecture.head_dim, runs_on_hopper(device)
        return attention_kernel(self.attention, device.type, num_slots, head_dim, dtype, on_hopper)

    def initialise(self, seed: int) -> None:
        """Draw all weights.

        The weights of a module depend on the seed and its name, and are drawn on the CPU, a few modules at a time. So
        they are the same on every device and for any sharding, and no process holds all sharded weights.
        """
        if next(self.parameters()).is_meta:
            return
        modules = ((base_name(name), module) for name, module in self.named_modules())
        owners = [(name, module) for name, module in modules if list(module.parameters(recurse=False))]
        # One thread draws 10^8 numbers a second, of which a model of the papers has up to 10^10.
        threads = min(8, usable_cores())
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(owners), threads):
                some = owners[start : start + threads]
                copies = pool.map(functools.partial(self._draw, seed), *zip(*some, strict=True))
                for (_, module), drawn in zip(some, copies, strict=True):
                    for key, parameter in module.named_parameters(recurse=False):
                        fill(parameter, drawn.get_parameter(key))

    # Entered by each thread: whether gradients are recorded is a thread's own.
    @torch.no_grad()
    def _draw(self, seed: int, name: str, module: nn.Module) -> nn.Module:
        """A copy of one module, whole and on the CPU, with initial weights."""
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        number = int.from_bytes(digest[:8], "little") >> 1
        drawn: Any = copy.copy(module)
        drawn._parameters = {
            key: None if parameter is None else nn.Parameter(torch.empty(parameter.shape, device="cpu"))
            for key, parameter in module._parameters.items()
        }
        is_matrix = name.startswith("blocks.") and isinstance(drawn, nn.Linear) and not is_of_adapter(name)
        values = self._initial_values().get(name)
        if is_matrix or values == "normal":
            to_residual = is_matrix and (".output." in name or name.endswith(".down"))
            std = INIT_STD / math.sqrt(2 * len(self.blocks)) if to_residual else INIT_STD
            nn.init.normal_(drawn.weight, std=std, generator=torch.Generator().manual_seed(number))
            if getattr(drawn, "bias", None) is not None:
                nn.init.zeros_(drawn.bias)
        elif values == "zero":
            for parameter in drawn.parameters():
                nn.init.zeros_(parameter)
        else:
            with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(number)
                drawn.reset_parameters()
        return cast(nn.Module, drawn)

    def _initial_values(self) -> dict[str, InitialValues]:
        """Names of the modules inside modalities that choose their initial values."""
        return {
            f"modalities.{name}.{inner}": values
            for name in self.modalities
            for inner, values in cast(Any, self.modalities[name]).initial_values.items()
        }

    def forward(
        self,
        inputs: dict[str, ModalityInput],
        slots: Slots | None = None,
        *,
        cache: CacheWindow | None = None,
        rope_positions: Tensor | None = None,
        z_loss_weight: float = 0.0,
    ) -> TransfusionOutput:
        """Predict the next token of every token slot and the diffusion target of every image.

        Args:
            inputs: Inputs by modality; a missing modality has no slots.
            slots: Ids of all slots, [B, S], in the order of `ModelConfig.stream_order`. None with a cache.
            cache: In sampling, the slots of earlier calls; the new slots, of one modality in each call, attend to them,
                too. For tokens the output then has only the logits of the last slot, [B, 1, V].
            rope_positions: With a cache, those of the new slots: [B, S] or [B, S, 3].
            z_loss_weight: Weight of the z-loss in every next-token loss, see `next_token_loss`.
        """
        config = self.architecture
        embedded: dict[str, Tensor] = {}
        kept: dict[str, Any] = {}
        for name in config.stream_order:
            if name in inputs:
                embedded[name], kept[name] = cast(Any, self.modalities[name]).embed(inputs[name])
        mask = None
        if slots is not None:
            rope_positions = slots.rope_positions
            kernel, _ = self.kernel(slots.order.device, slots.order.shape[1])
            mask = training_mask(slot_ids(config, inputs, slots), kernel)
        assert rope_positions is not None
        rotary = rotary_angles(rope_positions, config.head_dim, config.rope_theta, config.rope_scaling)
        unturned = unturned_angles(rotary) if config.layers_without_rope else rotary
        # Under autocast the residual stream has its number format, not that of the embedding.
        device_type = rope_positions.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            embedded = {name: hidden.to(dtype) for name, hidden in embedded.items()}
        streams = self._to_streams(embedded)
        for layer, block in enumerate(self.blocks):
            angles = unturned if layer in config.layers_without_rope else rotary
            streams = block(streams, angles, mask, None if cache is None else cache.layer(layer))
        terms: dict[str, Terms] = {}
        predictions: dict[str, Tensor] = {}
        for name, hidden in self._from_streams(streams, embedded).items():
            if config.modalities[name].objective == "read":
                continue
            modality, given = self.modality(name), cast(Any, inputs[name])
            if given.has_loss:
                terms[name] = modality.loss(hidden, given, kept[name], z_loss_weight)
            else:
                hidden = hidden[:, -1:] if cache is not None and isinstance(given, TokenInput) else hidden
                predictions[name] = modality.predict(hidden, given, kept[name])
        return TransfusionOutput(terms, predictions)

    def num_slots(self, name: str, given: ModalityInput) -> int:
        """Slots of a row that an input of a modality takes."""
        return given.num_slots(self.architecture.modalities[name].patch_size)

    def _to_streams(self, embedded: dict[str, Tensor]) -> Streams:
        """Join the modalities of each tower into its stream."""
        parts: dict[str, list[Tensor]] = {}
        for name, hidden in embedded.items():
            parts.setdefault(self.architecture.modalities[name].tower, []).append(hidden)
        return {tower: hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1) for tower, hidden in parts.items()}

    def _from_streams(self, streams: Streams, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the final norms and cut the streams back into modalities."""
        normed = {tower: eager_norm(hidden, cast(RMSNorm, self.final_norm[tower])) for tower, hidden in streams.items()}
        result = {}
        for name, tokens in embedded.items():
            tower, length = self.architecture.modalities[name].tower, tokens.shape[1]
            result[name], normed[tower] = normed[tower].split([length, normed[tower].shape[1] - length], dim=1)
        return result


def _compiled_in_training(forward: Callable[..., Streams]) -> Callable[..., Streams]:
    """The forward of a block, compiled if gradients are needed.

    Only the forward is compiled, because the hooks with which FSDP gathers weights must stay outside. Sampling is not
    compiled, because every length is a new shape.
    """
    compiled = torch.compile(forward, fullgraph=True, dynamic=False)

    @functools.wraps(forward)
    def choose(*args: Any, **kwargs: Any) -> Streams:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return choose


def base_name(name: str) -> str:
    """Name of a module or parameter without low-rank adapters; peft wraps a layer around each matrix."""
    return name.replace(".base_layer", "")


def is_of_adapter(name: str) -> bool:
    """Whether a module or parameter belongs to a low-rank adapter."""
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a tensor, or this process's shard of it, into a parameter."""
    if isinstance(parameter, DTensor):
        # All processes have drawn the same values, so nothing is sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        shards = distribute_tensor(whole.detach().to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.to_local().copy_(shards.to_local())
    else:
        parameter.copy_(whole)
