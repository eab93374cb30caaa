"""Memory of a training step, predicted from the sizes of the model and the batch.

It assumes compiled blocks. torch's partitioner chooses the tensors that a block keeps for its backward; a test traces
them. The prediction is within 2 % of the peaks measured on one H100 (docs/scaling.md).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from transfusion_mot.config import ModelConfig
from transfusion_mot.data.row_arrays import Block, RowShape
from transfusion_mot.losses import LOGITS_AT_ONCE
from transfusion_mot.models.adapters import ReadingAdapter
from transfusion_mot.models.layers import SwiGLU
from transfusion_mot.models.modalities import DiffusionModality, ReadModality, TokenModality
from transfusion_mot.models.mot import Checkpointing, MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter
from transfusion_mot.training.adamw_8bit import BLOCK, has_codes

Parallelism = Literal["ddp", "fsdp2"]
# Number of blocks whose gathered weights and gradients exist at the same time under FSDP: the current one and the next.
_GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part.

    Attributes:
        weights, gradients, optimizer, ema: One number for each (trained) parameter, two moments (one for parameters of
            Muon), and the averaged weights; if sharded, the share of the GPU. All are float32, except untrained
            weights and 8-bit moments.
        copies: Trained matrices in bfloat16, and under FSDP the gathered weights.
        blocks: Activations that the blocks keep for the backward pass.
        adapter: Activations of the patch adapters, the embeddings and the last norms.
        logits: Logits of a chunk, their gradient, and the resulting gradients.
        working: Memory of one block while its gradients are computed.
        gradients_stay: Gradients exist at the same time as all activations: with more than one microbatch, or in the
            buckets of data parallelism.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    copies: float
    blocks: float
    adapter: float
    logits: float
    working: float
    gradients_stay: bool

    @property
    def peak(self) -> float:
        """Maximum bytes at one time: at the end of the forward pass, or when all gradients exist."""
        forward = self.copies + self.blocks + self.adapter + max(self.logits, self.working)
        rest = forward + self.gradients if self.gradients_stay else max(forward, self.gradients + self.copies)
        return self.weights + self.optimizer + self.ema + rest


@dataclass(frozen=True)
class Learning:
    """Trained parts of a tower in a block: the backward pass needs the inputs of their matrices.

    Attributes:
        qkv, output, ffn_in, ffn_out: Whether weights or adapters of this projection or feed-forward matrix are trained.
        weights: Whether weights of a matrix are trained, not only adapters.
        ranks: Sum of the ranks of all adapters.
    """

    qkv: bool = True
    output: bool = True
    ffn_in: bool = True
    ffn_out: bool = True
    weights: bool = True
    ranks: int = 0

    @classmethod
    def of(cls, block: MoTBlock, tower: str) -> Self:
        """Trained parts of a block."""
        ffn = cast(SwiGLU, block.ffn[tower])
        parts = (block.qkv[tower], block.output[tower], nn.ModuleList([ffn.gate, ffn.up]), ffn.down)
        matrices = [
            [(name, matrix) for name, matrix in part.named_parameters() if matrix.ndim == 2 and matrix.requires_grad]
            for part in parts
        ]
        trained = [pair for part in matrices for pair in part]
        qkv, output, ffn_in, ffn_out = (bool(part) for part in matrices)
        return cls(
            qkv,
            output,
            ffn_in,
            ffn_out,
            weights=any(not is_of_adapter(f".{name}") for name, _ in trained),
            ranks=sum(len(matrix) for name, matrix in trained if "lora_A." in name),
        )


def kept_by_block(
    config: ModelConfig,
    slots: dict[str, int],
    checkpointing: Checkpointing,
    width: int,
    learning: Mapping[str, Learning] = MappingProxyType({}),
    attentions: int = 1,
) -> float:
    """Bytes that a compiled block keeps for its backward pass.

    Args:
        config: Configuration of the model.
        slots: Slots of each tower's stream.
        checkpointing: See `TransfusionMoT.checkpoint_activations`.
        width: Bytes of a number: 2 in bfloat16.
        learning: Trained parts of each tower; a missing tower is trained completely.
        attentions: Number of attention computations: more than one with insulated towers.
    """
    attention = config.num_heads * config.head_dim
    projection = attention + 2 * (config.num_kv_heads or config.num_heads) * config.head_dim
    total = 0.0
    for tower, count in slots.items():
        hidden, ffn = config.towers[tower].hidden_size, config.towers[tower].intermediate_size
        own = learning.get(tower, Learning())
        # The block's input.
        numbers = hidden
        if checkpointing == "selective":
            # Projection, attention, its output, gate and up; inputs of the second matrices of adapters.
            numbers += projection + attention + hidden * own.weights + 2 * ffn + own.ranks
        if checkpointing == "none":
            # The same, and the rotated heads.
            numbers += projection + attention + hidden + 2 * ffn + own.ranks + projection
            # Inputs of products: the two norms, the gated product, and a contiguous copy of each tower's part of the
            # attention.
            numbers += hidden * (own.qkv + own.ffn_in) + ffn * own.ffn_out
            numbers += attention if own.output and len(slots) > 1 else 0
        # For each additional attention: its output, and keys and values, some without gradients.
        more = {"none": projection, "selective": attention, "full": 0}[checkpointing]
        numbers += (attentions - 1) * more
        # The sum of exponentials of each head, and the scale of each norm, in float32.
        of_heads = 4 * config.num_heads * attentions
        scales = {"none": of_heads + 8, "selective": of_heads, "full": 0}[checkpointing]
        # Dropout masks of the outputs of attention and feed-forward, one byte for each element.
        masks = 2 * hidden if config.towers[tower].dropout else 0
        total += count * (numbers * width + scales + masks)
    return total


@dataclass(frozen=True)
class Setting:
    """Settings of a step.

    Attributes:
        rows: Rows of a microbatch.
        microbatches: Microbatches of a step on one GPU.
        gpus: GPUs that share the batch.
        parallelism: `ddp` keeps everything on every GPU, `fsdp2` shards weights, gradients, moments and averages.
        checkpointing: See `TransfusionMoT.checkpoint_activations`.
        width: Bytes of a number in the forward pass: 2 under bf16, else 4.
        optimizer: Name of the optimizer in `OptimizerConfig`.
        ema: Whether averaged weights are on the GPU.
    """

    rows: int
    microbatches: int = 1
    gpus: int = 1
    parallelism: Parallelism = "ddp"
    checkpointing: Checkpointing = "none"
    width: int = 2
    optimizer: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    ema: bool = True


def step_memory(model: TransfusionMoT, shape: RowShape, setting: Setting) -> Memory:
    """Memory of a step on one GPU; `model` is on `meta`, its frozen parameters need no gradient."""
    config, width, rows = model.architecture, setting.width, setting.rows
    sharded = setting.parallelism == "fsdp2"
    shards = setting.gpus if sharded else 1
    numbers, weights, moments = Counter[str](), 0, 0.0
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.") and parameter.ndim == 2
        weights += parameter.numel() * parameter.element_size()
        numbers["all"] += parameter.numel()
        numbers["block matrices"] += parameter.numel() * in_block
        if parameter.requires_grad:
            numbers["trained"] += parameter.numel()
            numbers["trained block matrices"] += parameter.numel() * in_block
            moments += bytes_of_moments(parameter, setting.optimizer, in_block)
    one_block = numbers["block matrices"] / config.num_layers

    first = cast(MoTBlock, model.blocks[0])
    learning = {tower: Learning.of(first, tower) for tower in config.towers}
    attentions = first.num_attentions
    slots = Counter[str]()
    for name, block in shape.blocks.items():
        slots[config.modalities[name].tower] += rows * block.num_slots
    towers = {tower: config.towers[tower] for tower in slots}
    # Gradients of a stream and of a feed-forward, for one tower at a time.
    working: float = width * (
        sum(count * towers[tower].hidden_size for tower, count in slots.items())
        + max(count * 3 * towers[tower].intermediate_size for tower, count in slots.items())
    )
    if setting.checkpointing != "none":
        working += kept_by_block(config, slots, "none", width, learning, attentions)
        working += width * numbers["trained block matrices"] / config.num_layers

    copies = 0.0
    if sharded:
        # Gathered weights and their gradients; embedding, head and adapter stay gathered.
        copies = (width + 4) * (_GATHERED_BLOCKS * one_block + numbers["all"] - numbers["block matrices"])
    elif width == 2 and setting.checkpointing == "none":
        # A compiled block keeps its matrices in the precision of the products.
        copies = 2.0 * numbers["trained block matrices"]

    # The last norms are not compiled: each keeps two float32 tensors and its result.
    last_norms = (8 + width) * sum(count * towers[tower].hidden_size for tower, count in slots.items())
    return Memory(
        weights=weights / shards,
        gradients=4 * numbers["trained"] / shards,
        optimizer=moments / shards,
        ema=4 * numbers["trained"] / shards if setting.ema else 0.0,
        copies=copies,
        blocks=config.num_layers * kept_by_block(config, slots, setting.checkpointing, width, learning, attentions),
        adapter=rows * sum(kept_by_adapter(model, name, block, width) for name, block in shape.blocks.items())
        + last_norms,
        logits=logits_memory(model, shape, rows, width),
        working=working,
        gradients_stay=setting.microbatches > 1 or setting.gpus > 1,
    )


def bytes_of_moments(parameter: Tensor, optimizer: str, in_block: bool) -> float:
    """Bytes of optimizer state for a trained parameter."""
    if optimizer == "adamw_8bit" and has_codes(parameter):
        return 2 * parameter.numel() * (1 + 4 / BLOCK)
    return parameter.numel() * (4 if optimizer == "muon" and in_block else 8)


def kept_by_adapter(model: TransfusionMoT, name: str, block: Block, width: int) -> float:
    """Bytes that a patch adapter keeps for the latents of one row: the tensors that autograd saves for one media slot
    in a pass on `meta`, times the number of slots. 0 for tokens."""
    modality = model.modalities[name]
    if block.latent_shape is None or isinstance(modality, TokenModality):
        return 0.0
    modality = cast(DiffusionModality | ReadModality, modality)
    adapter = modality.adapter
    weights = {parameter.untyped_storage()._cdata for parameter in adapter.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    channels, rows, columns = block.latent_shape
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents, timesteps = torch.empty(1, channels, rows, columns, device="meta"), torch.empty(1, device="meta")
        if isinstance(adapter, ReadingAdapter):
            adapter.embed(latents)
        else:
            hidden, skips = adapter.embed(latents, timesteps)
            prediction = adapter.predict(hidden, skips, rows, columns)
            assert prediction.shape == latents.shape
    numbers = sum(storage.nbytes() for storage in kept.values()) / 4
    # A residual layer keeps three numbers of each kind: under autocast those of its norm and its activation are in
    # float32, those of its convolution in bfloat16.
    return block.capacity * numbers * (10 / 3 if width == 2 else 4)


def logits_memory(model: TransfusionMoT, shape: RowShape, rows: int, width: int) -> float:
    """Bytes of the next-token losses of a number of rows while the activations exist.

    Modalities are computed one after the other; gradients of the hidden states and of the head stay.
    """
    stay = most = 0.0
    for name, block in shape.blocks.items():
        modality = model.modalities[name]
        if not isinstance(modality, TokenModality):
            continue
        slots, (vocab_size, hidden) = rows * block.num_slots, modality.head_weight.shape
        chunk = min(LOGITS_AT_ONCE, slots * vocab_size)
        # The gradient of a chunk still exists while the next chunk has logits and their gradient.
        chunks = 3 if slots * vocab_size > chunk else 2
        head = modality.head_weight
        stay += width * slots * hidden + 4 * head.numel() * head.requires_grad
        # The head in the number format of the logits, and a part of its gradient.
        copies = int(head.element_size() != width) + int(head.requires_grad)
        most = max(most, width * (chunks * chunk + copies * head.numel()))
    return stay + most
