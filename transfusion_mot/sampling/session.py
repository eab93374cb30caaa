"""Documents in the cache: reading tokens and latents into them, denoising the next latents, writing the next tokens.

Shapes: B rows that take part, C latent channels, Y and X latent height and width, P patches of latents, V vocabulary.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion_mot.data.layout import LatentSpan, TokenRun
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, TokenInput
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decode_step import FewRows
from transfusion_mot.sampling.decoding import Decoding, choose_tokens
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.per_row import padded
from transfusion_mot.sampling.workspace import Workspace

# A modality with token ids, or with clean latents [C, Y, X].
Fed = tuple[str, list[int] | Tensor]
# The host waits for the device only once in this many tokens, to see whether all rows have ended.
_TOKENS_BETWEEN_CHECKS = 16


class Session:
    """Rows of documents that grow segment by segment, independently of each other.

    A segment is first fed to a row and later read, together with those of other rows. The model reads a document in
    reading order and with the positions of training. Latents in the context are clean (t = 0), the lower end of their
    noise range in training.

    Args:
        model: The model.
        workspace: Memory for cache and steps.
        rows: Number of documents.
        capacity: Maximum number of slots of a document.
        device: Device of the model.
    """

    def __init__(
        self, model: TransfusionMoT, workspace: Workspace, *, rows: int, capacity: int, device: torch.device
    ) -> None:
        self.model = model
        self.workspace = workspace
        self.device = device
        self.cache = workspace.cache(model, rows, capacity, device)
        self._counters = [PositionCounter(model.architecture.rope) for _ in range(rows)]
        # Fed latents are clean.
        self._readers = model.architecture.readers
        self._fed: list[list[Fed]] = [[] for _ in range(rows)]

    def clear(self, row: int) -> None:
        """Forget a document."""
        self._counters[row] = PositionCounter(self.model.architecture.rope)
        self._fed[row] = []

    def feed(self, row: int, *parts: TokenRun | LatentSpan) -> None:
        """Feed the next segment of a document."""
        fed = self._fed[row]
        for part in parts:
            if isinstance(part, LatentSpan):
                modality = part.media.modality
                fed.append((self._readers.get(modality, modality), part.media.content))
            elif fed and fed[-1][0] == part.modality and isinstance(fed[-1][1], list):
                fed[-1] = part.modality, fed[-1][1] + part.ids
            elif part.ids:
                fed.append((part.modality, part.ids))

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> None:
        """Read all fed segments of these rows, batched by modality and, for latents, by size."""
        while waiting := [row for row in rows if self._fed[row]]:
            groups: dict[tuple[str, torch.Size | None], dict[int, list[int] | Tensor]] = {}
            for row in waiting:
                modality, content = self._fed[row].pop(0)
                shape = content.shape if isinstance(content, Tensor) else None
                groups.setdefault((modality, shape), {})[row] = content
            for (modality, shape), contents in groups.items():
                if shape is None:
                    self._read_tokens(modality, list(contents), [np.array(ids) for ids in contents.values()])
                else:
                    latents = torch.stack([cast(Tensor, part).to(self.device) for part in contents.values()])
                    self.read_latents(modality, list(contents), latents, timestep=0.0)

    def _read_tokens(self, modality: str, rows: list[int], tokens: list[NDArray[np.int64]]) -> None:
        longest = max(map(len, tokens))
        fits = [self._counters[row].order + longest <= self.cache.capacity for row in rows]
        if not all(fits):
            # A kernel that counts slots reads filler, too, so filler must lie inside the cache. The row with the
            # longest segment has no filler, so it always fits.
            for together in (True, False):
                places = [place for place, fit in enumerate(fits) if fit == together]
                self._read_tokens(modality, [rows[place] for place in places], [tokens[place] for place in places])
            return
        lengths = self._lengths(rows)
        positions = [self._counters[row].text(len(ids))[1] for row, ids in zip(rows, tokens, strict=True)]
        self._check_positions(self._counters[row] for row in rows)
        # No token of a row sees its filler, and the next segment overwrites it.
        ids, rope_positions = padded(tokens, self.device), padded(positions, self.device)
        window = self.cache.window(lengths, ids.shape[1], causal=True, rows=self._index(rows), end=self._longest(rows))
        with self._uncompiled():
            self.model({modality: TokenInput(ids)}, cache=window, rope_positions=rope_positions)

    def read_latents(self, modality: str, rows: list[int], latents: Tensor, *, timestep: float) -> None:
        """Read latents [B, C, Y, X] with the noise of that timestep into the rows."""
        lengths = self._lengths(rows)
        rope_positions = self._patch_positions(modality, [self._counters[row] for row in rows], latents.shape)
        patches = rope_positions.shape[1]
        causal = self._is_causal(modality)
        window = self.cache.window(lengths, patches, causal=causal, rows=self._index(rows), end=self._longest(rows))
        timesteps = torch.full((len(rows), 1), timestep, dtype=latents.dtype, device=self.device)
        given = LatentInput(latents[:, None].to(self.model.dtype), timesteps)
        with self._uncompiled():
            self.model({modality: given}, cache=window, rope_positions=rope_positions)

    def denoiser(self, modality: str, rows: list[int], noisy_latents: Tensor) -> Callable[[Tensor, float], Tensor]:
        """A function (noisy latents [B, C, Y, X], timestep) => prediction for the next latents of these rows.

        The prediction is [len(rows), C, Y, X]: for all B latents with the first B rows, then with the next B and so on.
        Each call forwards only the patches and overwrites those of the last call, so the context does not change.

        Args:
            modality: Modality of the latents.
            rows: Rows that the latents belong to; all of their fed segments have been read.
            noisy_latents: Example with the shape and number format of the latents.
        """
        model, cache, causal = self.model, self.cache, self._is_causal(modality)
        lengths, index = self._lengths(rows), self._index(rows)
        # Copies, because the latents are not in the document yet.
        counters = [copy.copy(self._counters[row]) for row in rows]
        rope_positions = self._patch_positions(modality, counters, noisy_latents.shape)
        patches = rope_positions.shape[1]
        end = self.workspace.end(self._longest(rows) + patches)
        state = {
            "noisy_latents": noisy_latents.clone(),
            "timestep": noisy_latents.new_zeros(()),
            "lengths": lengths,
            "rope_positions": rope_positions,
        }
        if index is not None:
            state["rows"] = index

        def body(state: dict[str, Tensor]) -> Tensor:
            window = cache.window(state["lengths"], patches, causal=causal, rows=state.get("rows"), end=end)
            latents = state["noisy_latents"].to(model.dtype)
            latents = latents.repeat(len(rows) // len(latents), 1, 1, 1)[:, None]
            given = LatentInput(latents, state["timestep"].expand(len(rows), 1))
            output = model({modality: given}, cache=window, rope_positions=state["rope_positions"])
            return output.predictions[modality][:, 0].to(state["noisy_latents"].dtype)

        step = self.workspace.step(("denoise", modality), body, state)

        @torch.no_grad()
        def predict(noisy_latents: Tensor, timestep: float) -> Tensor:
            step.fill(noisy_latents=noisy_latents, timestep=timestep)
            # A clone, because a solver may keep predictions and the next call overwrites this one.
            return step().clone()

        return predict

    @torch.no_grad()
    def write(
        self,
        modality: str,
        branches: list[list[int]],
        *,
        forbidden: Tensor,
        ends: list[int],
        decoding: Decoding,
        uniform: Tensor,
        guidance: Guidance | None = None,
    ) -> list[list[int]]:
        """Write tokens of a modality into rows, each until one of `ends` => the written tokens, including the end.

        Args:
            modality: Modality of the tokens.
            branches: Rows to write in, and for guidance other versions of the same documents, in the same order.
                Each row must have a fed segment that was not read yet.
            forbidden: Bool [B, V], tokens that a row may not write.
            ends: Tokens that end a row; they are not read. Without any, all rows are as long as `uniform`.
            decoding: Settings for choosing tokens.
            uniform: [B, steps] numbers in [0, 1); a row uses one for each token, so it has at most this many tokens.
            guidance: Combines the logits of several branches.
        """
        model, cache = self.model, self.cache
        rows = [row for branch in branches for row in branch]
        held_back = [self._hold_back(row) for row in rows]
        self.read(rows)
        steps = uniform.shape[1]
        self._check_positions((self._counters[row] for row in rows), steps)
        index = self._index(rows)
        state = {
            "lengths": self._lengths(rows),
            "positions": torch.tensor([self._counters[row].position for row in rows], device=self.device),
            "step": torch.zeros(1, dtype=torch.long, device=self.device),
            # After the token that is read first; -1 where nothing is written yet.
            "written": torch.full((len(rows), 1 + steps), -1, device=self.device),
            "uniform": uniform.to(self.device),
            "forbidden": forbidden.to(self.device),
        }
        state["written"][:, 0] = torch.tensor(held_back, device=self.device)
        if index is not None:
            state["rows"] = index
        few_rows = FewRows(model, cache, modality)
        by_kernels = few_rows.serves(len(rows))
        if by_kernels:
            state |= few_rows.state(state["positions"], steps)
        axes = 1 if model.architecture.rope == "1d" else 3
        end = self.workspace.end(self._longest(rows) + steps)

        def read(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
            window = cache.window(state["lengths"] + state["step"], 1, causal=True, rows=state.get("rows"), end=end)
            rope_positions = (state["positions"] + state["step"])[:, None]
            if axes > 1:
                rope_positions = rope_positions[..., None].expand(-1, -1, axes)
            output = model({modality: TokenInput(tokens)}, cache=window, rope_positions=rope_positions)
            return output.predictions[modality][:, 0]

        def body(state: dict[str, Tensor]) -> Tensor:
            tokens = state["written"].index_select(1, state["step"])
            logits = few_rows.logits(tokens[:, 0], state) if by_kernels else read(state, tokens)
            logits = logits if guidance is None else guidance.combine(logits.chunk(len(branches)))
            logits = logits.masked_fill(state["forbidden"], -math.inf)
            chosen = choose_tokens(logits, decoding, state["uniform"].index_select(1, state["step"])[:, 0])
            # Ended rows continue, too: their tokens are cut off, and nothing reads their slots.
            state["step"].add_(1)
            # All branches of a document read the same.
            state["written"].index_copy_(1, state["step"], chosen.repeat(len(branches))[:, None])
            return chosen

        step = self.workspace.step(("write", modality, len(branches), decoding, guidance), body, state)
        written_ids, end_ids = step.state["written"][:, 1:], torch.tensor(ends, device=self.device)
        for done in range(1, steps + 1):
            step()
            asks = bool(ends) and done % _TOKENS_BETWEEN_CHECKS == 0 and done < steps
            if asks and torch.isin(written_ids, end_ids).any(1).all():
                break
        written = []
        for row, ids in zip(rows, written_ids.tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(ids) if token in ends), steps)
            self._counters[row].text(length)
            written.append(ids[:length])
        return written[: len(branches[0])]

    def _hold_back(self, row: int) -> int:
        """Take back the last token fed to a row; it is read when the next one is written."""
        modality, last = self._fed[row][-1]
        assert isinstance(last, list)
        *before, token = last
        self._fed[row][-1:] = [(modality, before)] if before else []
        return token

    def _is_causal(self, modality: str) -> bool:
        return not self.model.architecture.modalities[modality].is_bidirectional

    def _patch_positions(self, modality: str, counters: list[PositionCounter], latents: torch.Size) -> Tensor:
        """Rotary positions of the next latents of each document; advances the counters."""
        patch_size = self.model.architecture.modalities[modality].patch_size
        height, width = latents[-2] // patch_size, latents[-1] // patch_size
        positions = padded([counter.image(height, width)[1] for counter in counters], self.device)
        self._check_positions(counters)
        return positions

    def _check_positions(self, counters: Iterable[PositionCounter], more: int = 0) -> None:
        """Refuse documents that with `more` slots would exceed the model's maximum of rotary positions."""
        longest = max(counter.position for counter in counters) + more
        limit = self.model.architecture.max_position_embeddings
        if limit is not None and longest > limit:
            raise UserError(
                f"a document needs up to {longest} rotary positions, but the model has {limit}; give a shorter one, or "
                "fewer tokens to write"
            )

    def _lengths(self, rows: list[int]) -> Tensor:
        return torch.tensor([self._counters[row].order for row in rows], device=self.device)

    def _index(self, rows: list[int]) -> Tensor | None:
        return None if rows == list(range(len(rows))) else torch.tensor(rows, device=self.device)

    def _longest(self, rows: list[int]) -> int:
        return max(self._counters[row].order for row in rows)

    def _uncompiled(self) -> contextlib.AbstractContextManager[object]:
        """Context for reading without compilation: the segments have many shapes, and each would be compiled."""
        compiled = self.model.blocks[0]._compiled_call_impl is not None
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
