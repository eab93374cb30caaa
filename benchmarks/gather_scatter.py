"""A contender for the training-step benchmark: Mixture-of-Transformers by gather and scatter, with the same weights.

The tokens of a batch are packed in reading order. Every operation with weights per modality gathers each modality's
tokens by index and scatters the results to a new buffer, as in BAGEL (https://github.com/ByteDance-Seed/Bagel,
`modeling/bagel/qwen2_navit.py`, the decoder layer of its MoT) and Mixture-of-Transformers
(https://github.com/facebookresearch/Mixture-of-Transformers, `src`).

As in BAGEL: one packed sequence [L, D] without a batch axis; index tensors made once per batch and used by all layers;
in every layer a gather and a scatter for the first norm, for queries, keys and values (one buffer each), for the output
projection and for norm and feed-forward together; residual additions on the packed sequence; one FlexAttention over all
modalities.

Like the originals and unlike ours, it has no fused kernel for the norm and rotation of queries and keys.

It is faster than the originals in these points:

| here | originals |
| --- | --- |
| `compile_blocks` compiles each block, with gathers and scatters | BAGEL: only attention and mask |
| so the backward of a gather can use atomic additions | sorts the indices |
| indices | Mixture-of-Transformers: boolean masks, each of which makes the host wait for the device |
| constant shapes with padding: compiled once | BAGEL: lengths change with the batch |
| buffers start uninitialised | BAGEL: filled with zeros |
| query, key and value are one matrix product | three |
| the norm of queries and keys in the same gather | BAGEL: a gather and a scatter each |
| attention by rows [B, N, S, H], a view of the packed sequence | BAGEL: one row of L |
| the mask has B x S x S entries, once for all heads | BAGEL: L x L, once for each head |
| heads read the final norm's result of their modality | BAGEL: scattered once more, then gathered |
| our text loss, which never has all logits in memory | BAGEL: all logits of labelled tokens |

Shapes: B rows, S slots a row, L = B*S, N query heads, M key/value heads, H head width, D width.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from transfusion_mot.errors import UserError
from transfusion_mot.models.attention import AttentionMask, SlotIds, joint_attention, slot_ids, training_mask
from transfusion_mot.models.inputs import ModalityInput, Slots
from transfusion_mot.models.layers import QKVProjection, rotary_angles, rotate
from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT, TransfusionOutput

Indexes = dict[str, Tensor]


class ReadingOrder(NamedTuple):
    """Order of the slots of a batch when its rows are packed in reading order.

    Attributes:
        slots: [B, S], the slot in its row of each place of the packed row.
        places: [B, S], the place of each slot in the packed sequence of L.
    """

    slots: Tensor
    places: Tensor


def reading_order(document_ids: Tensor, order: Tensor) -> ReadingOrder:
    """Sort the slots of each row by document and order, padding last; without waiting for the device."""
    length = document_ids.shape[1]
    # A row has at most S documents, and a document at most S slots.
    documents = torch.where(document_ids < 0, length, document_ids)
    slots = (documents * length + order).argsort(dim=1, stable=True)
    starts = torch.arange(len(slots), device=slots.device)[:, None] * length
    return ReadingOrder(slots, slots.argsort(dim=1) + starts)


def scatter(values: list[Tensor], indexes: Indexes) -> Tensor:
    """Values of each modality [its slots, ...] => packed [L, ...]."""
    packed = values[0].new_empty(sum(map(len, values)), *values[0].shape[1:])
    for index, value in zip(indexes.values(), values, strict=True):
        packed[index] = value
    return packed


class GatherScatterBlock(nn.Module):
    """The computation of a `MoTBlock`, on packed tokens.

    Args:
        block: Its weights.
        towers: Modality to tower.
    """

    def __init__(self, block: MoTBlock, towers: dict[str, str]) -> None:
        super().__init__()
        self.block = block
        self.towers = towers

    def forward(
        self, packed_LD: Tensor, indexes: Indexes, rotary: tuple[Tensor, Tensor], mask: AttentionMask
    ) -> Tensor:
        """Packed tokens => packed tokens; `rotary` and `mask` in reading order by rows [B, S]."""
        block, towers = self.block, self.towers
        normed_LD = scatter([block.attention_norm[towers[m]](packed_LD[i]) for m, i in indexes.items()], indexes)
        qkv = {m: cast(QKVProjection, block.qkv[towers[m]]) for m in indexes}
        projected = [qkv[m].split(qkv[m](normed_LD[i][None])) for m, i in indexes.items()]
        rows = rotary[0].shape[:2]
        q_BSNH, k_BSMH, v_BSMH = (
            scatter([part[0] for part in parts], indexes).unflatten(0, rows) for parts in zip(*projected, strict=True)
        )
        q_BNSH, k_BMSH = rotate(q_BSNH, *rotary).transpose(1, 2), rotate(k_BSMH, *rotary).transpose(1, 2)
        attended_LA = joint_attention(q_BNSH, k_BMSH, v_BSMH.transpose(1, 2), mask).transpose(1, 2).flatten(2)
        attended_LA = attended_LA.flatten(0, 1)
        packed_LD = packed_LD + scatter([block.output[towers[m]](attended_LA[i]) for m, i in indexes.items()], indexes)
        return packed_LD + scatter(
            [block.ffn[towers[m]](block.ffn_norm[towers[m]](packed_LD[i])) for m, i in indexes.items()], indexes
        )


class GatherScatterMoT(nn.Module):
    """A `TransfusionMoT` computed by gather and scatter; its parameters are that model's own.

    Args:
        model: The weights. Its towers need the same width, because their tokens share a buffer.

    Raises:
        UserError: The towers differ in width.
    """

    def __init__(self, model: TransfusionMoT) -> None:
        super().__init__()
        widths = {name: tower.hidden_size for name, tower in model.architecture.towers.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"model.towers have hidden_size {widths}; gather and scatter need the same for all")
        self.model = model
        towers = {name: modality.tower for name, modality in model.architecture.modalities.items()}
        self.blocks = nn.ModuleList(GatherScatterBlock(cast(MoTBlock, block), towers) for block in model.blocks)

    def compile_blocks(self) -> None:
        """Compile every block; they have the same code, so it is compiled once."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def forward(
        self, inputs: dict[str, ModalityInput], slots: Slots, *, z_loss_weight: float = 0.0
    ) -> TransfusionOutput:
        """Like `TransfusionMoT.forward` in training: inputs of all modalities, and no cache."""
        model = self.model
        config = model.architecture
        rows = slots.order.shape[0]
        read, places = reading_order(slots.document_ids, slots.order)
        names = [name for name in config.stream_order if name in inputs]
        lengths = [model.num_slots(name, inputs[name]) for name in names]
        indexes = {name: part.flatten() for name, part in zip(names, places.split(lengths, dim=1), strict=True)}
        ids = slot_ids(config, inputs, slots)
        ids = SlotIds(
            ids.document_ids.gather(1, read),
            ids.order.gather(1, read),
            ids.horizon.gather(1, read),
            None if ids.visible_until is None else ids.visible_until.gather(1, read),
        )
        kernel, _ = model.kernel(read.device, read.shape[1])
        mask = training_mask(ids, kernel)
        positions = slots.rope_positions[torch.arange(rows, device=read.device)[:, None], read]
        rotary = rotary_angles(positions, config.head_dim, config.rope_theta)

        embedded: dict[str, Tensor] = {}
        kept: dict[str, Any] = {}
        for name in names:
            embedded[name], kept[name] = model.modality(name).embed(cast(Any, inputs[name]))
        # The residual stream has the number format of autocast, as in the model.
        device_type = read.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            embedded = {name: hidden.to(dtype) for name, hidden in embedded.items()}
        packed_LD = scatter([hidden.flatten(0, 1) for hidden in embedded.values()], indexes)
        for block in self.blocks:
            packed_LD = block(packed_LD, indexes, rotary, mask)

        terms, predictions = {}, {}
        for name, index in indexes.items():
            hidden = model.final_norm[config.modalities[name].tower](packed_LD[index]).unflatten(0, (rows, -1))
            modality, given = model.modality(name), cast(Any, inputs[name])
            if given.has_loss:
                terms[name] = modality.loss(hidden, given, kept[name], z_loss_weight)
            else:
                predictions[name] = modality.predict(hidden, given, kept[name])
        return TransfusionOutput(terms, predictions)
