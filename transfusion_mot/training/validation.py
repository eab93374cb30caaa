"""Losses on held-out documents at fixed timesteps and with fixed noise, so that runs and steps are comparable."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from transfusion_mot.config import TEXT, EditDropoutConfig, RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.documents import DocumentReader
from transfusion_mot.data.layout import Media
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import Documents, MediaItem
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.metrics import CAPTION_LOSS, loss_name
from transfusion_mot.training.step import loss_terms

# (bucket, packer of its rows).
_Packers = list[tuple[int, Packer]]

# Equidistant, as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.3).
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 0


class Validation:
    """Held-out rows, and the losses of a model on them.

    For the loss of each modality, captions stand before their media: `text_loss` covers all text, a loss of media is
    conditional on the items before them. For `caption_loss`, captions stand after clean media. Losses without held-out
    documents are missing. Without media there are only rows of texts or codes.

    With `data.orders` there are rows for each order, with documents that have its items. The loss of a token modality
    covers the rows of all orders; a loss of latents covers the orders that end with them. The last item of each order
    has its own loss, such as `speech_loss/text-speech`. There is no `caption_loss`.

    Args:
        sources: Held-out sources, at least one.
        tokenizer: The run's tokenizer.
        config: The run's configuration.
        encoder: Encodes media that have no cached latents.
        rows_at_once: Rows of one forward.
        prompt_dropout_prob: Share of the media without anything before them (neither caption nor source image).
        one_a_row: Give each document with media a row of its own. Otherwise rows are as full as in training, and there
            are as many as are needed if all documents are as short as the shortest.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: TextTokenizer,
        config: RunConfig,
        *,
        encoder: OnlineEncoder,
        rows_at_once: int,
        prompt_dropout_prob: float = 0.0,
        one_a_row: bool = False,
    ) -> None:
        self.encoder = encoder
        self.rows_at_once = rows_at_once
        data = dataclasses.replace(
            config.data,
            prompt_dropout_prob=prompt_dropout_prob,
            edit_dropout=EditDropoutConfig(0.0, 0.0, prompt_dropout_prob),
            random_flip=False,
            lookahead=1,
        )
        total = sources.num_media_documents()
        wanted = min(total, config.training.num_validation_documents)
        held_out = {name for source in sources.sources for name in source.documents.modalities}
        self.latents = [name for name in config.model.of_objective("diffusion") if name in held_out]
        timesteps_from_uniform = Diffusion.from_config(config.diffusion).timesteps_from_uniform

        def packer(sources: Sources, layout: dict[str, Any], num_rows: int) -> Packer:
            return Packer(
                sources,
                tokenizer,
                dataclasses.replace(data, **layout),
                config.model,
                num_lanes=num_rows,
                seed=SEED,
                timesteps_from_uniform=timesteps_from_uniform,
                most_documents=1 if one_a_row else None,
            )

        def packers(sources: Sources, layout: dict[str, Any], order: Sequence[str] | None = None) -> _Packers:
            """(bucket, packer) of every bucket with media; one lane for each row, so that no media come twice."""
            result = []
            for bucket, pools in enumerate(sources.media_pools):
                if not pools:
                    continue
                available = sum(sources.pools[pool].length for pool in pools)
                # The order has an item after the media.
                is_copied = order is not None or layout.get("caption_first_prob") == 0
                most = most_in_a_row(
                    sources, bucket, config, is_copied=config.data.has_copies and is_copied, order=order
                )
                num_rows = max(1, wanted * available // total // (1 if one_a_row else most))
                result.append((bucket, packer(sources, layout, num_rows)))
            return result

        caption_first = {"caption_first_prob": 1.0}
        orders = {order: chance for order, chance in (config.data.orders or {}).items() if chance > 0}
        others = sources.only(lambda documents: not documents.is_paired) if orders else sources
        self.caption_first: _Packers = packers(others, caption_first) if others.sources else []
        if others.sources and not self.caption_first:
            # Token-only documents fill rows of the first bucket, whose media slots stay empty.
            self.caption_first = [(0, packer(others, caption_first, token_rows(others, tokenizer, config)))]
        self.media_first: _Packers = []
        if not orders:
            paired = sources.only(lambda documents: documents.is_paired)
            self.media_first = packers(paired, {"caption_first_prob": 0.0})
        self.orders: dict[str, _Packers] = {}
        for order in orders:
            having = sources.only(partial(_has_order, order=order))
            if having.sources:
                self.orders[order] = packers(having, {"orders": {order: 1.0}}, order.split())
        rows = [*self.caption_first, *itertools.chain(*self.orders.values())]
        self.num_rows = sum(packer.num_lanes for _, packer in rows)

    @torch.no_grad()
    def losses(self, model: TransfusionMoT, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses over all held-out rows, by name; called by all ranks, which share the rows."""
        timesteps = TIMESTEPS if self.latents else ()
        names = model.architecture.made
        # Rows of each kind, and the timesteps of their latents.
        kinds: list[tuple[_Packers, Sequence[float]]] = [(self.media_first, ()), (self.caption_first, timesteps)]
        kinds += [(rows, timesteps if last_of(order) in self.latents else ()) for order, rows in self.orders.items()]
        # Without noise, and at each timestep.
        sums = torch.zeros(len(kinds), 1 + len(timesteps), len(names), 2, dtype=torch.float64, device=_device(model))
        with accelerator.autocast():
            for kind, (rows, noised_at) in enumerate(kinds):
                for batch in self._batches(rows, model, accelerator):
                    for index, timestep in enumerate((0.0, *noised_at)):
                        sums[kind, index] += _sums_and_counts(model, batch.at(timestep))
        sums = accelerator.reduce(sums, reduction="sum")
        # Captions after their media have their own loss.
        losses = self._means(sums[1:].sum(0), names)
        if TEXT in names and loss_name(TEXT) in losses and self.media_first:
            losses[CAPTION_LOSS] = self._means(sums[0], names)[loss_name(TEXT)]
        for kind, order in enumerate(self.orders, start=2):
            last = last_of(order)
            of_order = self._means(sums[kind], names)
            if loss_name(last) in of_order:
                losses[f"{loss_name(last)}/{'-'.join(order.split())}"] = of_order[loss_name(last)]
        return losses

    def _means(self, sums: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Sums and counts [1 + timesteps, modalities, 2] => mean losses; for latents the mean and each timestep."""
        means, counts = (sums[..., 0] / sums[..., 1].clamp(min=1)).tolist(), sums[..., 1].tolist()
        losses = {}
        for place, name in enumerate(names):
            if name not in self.latents:
                if counts[0][place]:
                    losses[loss_name(name)] = means[0][place]
                continue
            if counts[1][place]:
                per_timestep = [row[place] for row in means[1:]]
                losses[loss_name(name)] = sum(per_timestep) / len(per_timestep)
                losses |= {f"{loss_name(name)}/t={t}": loss for t, loss in zip(TIMESTEPS, per_timestep, strict=True)}
        return losses

    @torch.no_grad()
    def item_losses(
        self, model: TransfusionMoT, accelerator: Accelerator, modality: str, timesteps: Sequence[float]
    ) -> Tensor:
        """[N, len(timesteps)], loss per element of each held-out item of a modality of latents at each timestep; called
        by all ranks."""
        found = []
        with accelerator.autocast():
            for batch in self._batches(self._ending_in(modality), model, accelerator):
                given = batch.latents(modality)
                assert given.mask is not None
                elements = given.latents[0, 0].numel()
                losses = [loss_terms(model, batch.at(t))[modality].losses / elements for t in timesteps]
                found.append(torch.stack(losses, dim=-1)[given.mask].cpu().double())
        gathered: list[Tensor] = gather_object([torch.cat(found)])
        return torch.cat(gathered)

    @torch.no_grad()
    def row_losses(self, model: TransfusionMoT, accelerator: Accelerator, modality: str) -> Tensor:
        """[N, 2], summed loss of a modality of tokens and number of its labels in each held-out row that has some;
        called by all ranks."""
        found = []
        with accelerator.autocast():
            for batch in self._batches(self._ending_in(modality), model, accelerator):
                labels = batch.tokens(modality).labels
                assert labels is not None
                losses = loss_terms(model, batch.at(0.0))[modality].losses.sum(dim=1)
                counts = (labels != IGNORE_INDEX).sum(dim=1)
                found.append(torch.stack([losses.cpu().double(), counts.cpu().double()], dim=1))
        gathered: list[Tensor] = gather_object([torch.cat(found)])
        rows = torch.cat(gathered)
        return rows[rows[:, 1] > 0]

    def _ending_in(self, modality: str) -> _Packers:
        """Rows with captions before their media, and those of the orders that end with a modality."""
        of_orders = (rows for order, rows in self.orders.items() if last_of(order) == modality)
        return [*self.caption_first, *itertools.chain(*of_orders)]

    def batches(self, model: TransfusionMoT, accelerator: Accelerator) -> Iterator[Batch]:
        """This rank's rows for the losses of each modality: captions before media, or all orders."""
        return self._batches([*self.caption_first, *itertools.chain(*self.orders.values())], model, accelerator)

    def _batches(self, packers: _Packers, model: TransfusionMoT, accelerator: Accelerator) -> Iterator[Batch]:
        """This rank's rows; every rank has the same number of batches, because all ranks forward a sharded model
        together."""
        device = _device(model)
        for bucket, packer in packers:
            is_compiled = is_compiled_for_shape(model, device, packer.num_slots(bucket))
            lanes = range(accelerator.process_index, packer.num_lanes, accelerator.num_processes)
            for start in range(0, -(-packer.num_lanes // accelerator.num_processes), self.rows_at_once):
                chunk = lanes[start : start + self.rows_at_once]
                # Padding rows without a loss: one if no rows are left; with FlexAttention, which is compiled for every
                # shape, as many as give all batches the shape of training. Without gradients only the encoder is
                # also compiled, and it pads its batches itself.
                rows = self.rows_at_once if is_compiled else max(1, len(chunk))
                used = [*chunk, *[0] * (rows - len(chunk))]
                states = np.tile(packer.initial_state(), (rows, 1))
                batch = self.encoder(packer.rows(used, 0, states, bucket)[0].to(device))
                yield batch if len(chunk) == rows else batch.emptied(len(chunk))


def _device(model: TransfusionMoT) -> torch.device:
    return next(model.parameters()).device


def _sums_and_counts(model: TransfusionMoT, batch: Batch) -> Tensor:
    """[modalities, 2]: summed loss of each modality, and its labelled tokens or elements."""
    terms = loss_terms(model, batch)
    sums = torch.stack([terms[name].losses.sum() for name in batch.with_loss])
    return torch.stack([sums.double(), batch.counts()], dim=1)


def is_compiled_for_shape(model: TransfusionMoT, device: torch.device, num_slots: int) -> bool:
    """Whether attention over these rows is compiled again for each number of rows."""
    return model.kernel(device, num_slots)[0] == "flex"


def _has_order(documents: Documents, order: str) -> bool:
    return documents.is_paired and set(order.split()) <= set(documents.modalities)


def last_of(order: str) -> str:
    """The modality of the last item of an order."""
    return order.split()[-1]


def most_in_a_row(
    sources: Sources, bucket: int, config: RunConfig, *, is_copied: bool, order: Sequence[str] | None = None
) -> int:
    """Maximum number of documents with media of a bucket in a row, if their texts are short.

    Args:
        is_copied: Whether latents have a clean copy, which also takes a slot.
        order: The modalities of the documents; None is all that they have.
    """
    shortest: dict[str, int] = {}
    for pool in (sources.pools[index] for index in sources.media_pools[bucket]):
        source = sources.sources[pool.source]
        for position in range(min(pool.length, config.training.num_validation_documents)):
            taken: Counter[str] = Counter()
            for item in source.documents.document(pool.item(position)):
                if not isinstance(item, MediaItem) or (order is not None and item.modality not in order):
                    continue
                encoded, reader = source.encoded.get(item.modality), config.model.readers.get(item.modality)
                copied = is_copied and (order is None or item.modality != order[-1])
                media = Media(item.modality, None, copied, item.is_condition, reader)
                if encoded is not None and encoded.kind == "codes":
                    if not encoded.readable[item.index]:
                        continue
                    media = Media(item.modality, encoded.span(item.index))
                taken += media.slots
            shortest |= {name: min(length, shortest.get(name, length)) for name, length in taken.items()}
    room = [config.data.slots[name] // length for name, length in shortest.items()]
    # A document may have only one of its modalities; a document of an order has all of them.
    return max(1, sum(room) if order is None else min(room, default=1))


def token_rows(sources: Sources, tokenizer: TextTokenizer, config: RunConfig) -> int:
    """Number of rows for the token-only documents of a validation, or for all held-out ones if there are fewer."""
    most = config.training.num_validation_documents
    reader = DocumentReader(tokenizer, config.data, config.model.readers)
    num_rows = 1
    for name, indices in sources.stream_pools.items():
        pools = [sources.pools[index] for index in indices]
        documents = [
            reader.read(sources.sources[pool.source], pool.item(position), np.random.default_rng(SEED))
            for pool in pools
            for position in range(min(pool.length, most))
        ]
        lengths = [
            sum(len(segment) for segment in document.segments if isinstance(segment, list)) for document in documents
        ]
        wanted = min(most, sum(pool.length for pool in pools))
        num_rows = max(num_rows, int(wanted * np.mean(lengths or [0])) // config.data.slots[name])
    return num_rows
