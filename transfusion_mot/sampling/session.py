"""Documents in the cache: reading text and images into them, denoising the next image, writing the next tokens.

Shapes: B rows that take part, C latent channels, Y and X latent height and width, P patches an image, V vocabulary.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.few_rows import FewRows
from transfusion_mot.sampling.rows import padded
from transfusion_mot.sampling.text import Decoding, choose_tokens
from transfusion_mot.sampling.workspace import Workspace

# Token ids, or the clean latents [C, Y, X] of an image.
Segment = list[int] | Tensor
# A model under way never waits for the device but once in so many tokens, to see whether all rows have ended.
_TOKENS_BETWEEN_CHECKS = 16


class Session:
    """Rows of documents that grow segment by segment, each at its own pace.

    A segment is fed to a row first and read later, together with those of other rows. The model reads a document in
    reading order and with the positions of training; an image that is context is clean (t = 0), the end of the noise
    that it has in training.

    Args:
        model: Reads and predicts.
        workspace: Memory.
        rows: Documents.
        capacity: Most slots of one.
        device: Where the model is.
    """

    def __init__(
        self, model: TransfusionMoT, workspace: Workspace, rows: int, capacity: int, device: torch.device
    ) -> None:
        self.model = model
        self.workspace = workspace
        self.device = device
        self.cache = workspace.cache(model, rows, capacity, device)
        self._counters = [PositionCounter(model.architecture.rope) for _ in range(rows)]
        self._fed: list[list[Segment]] = [[] for _ in range(rows)]

    def clear(self, row: int) -> None:
        """Forget a document."""
        self._counters[row] = PositionCounter(self.model.architecture.rope)
        self._fed[row] = []

    def feed(self, row: int, *segments: Segment) -> None:
        """What comes next in a document."""
        fed = self._fed[row]
        for segment in segments:
            if fed and isinstance(segment, list) and isinstance(fed[-1], list):
                fed[-1] = fed[-1] + segment
            elif isinstance(segment, Tensor) or segment:
                fed.append(segment)

    @torch.no_grad()
    def read(self, rows: Sequence[int]) -> None:
        """Read all that was fed to these rows; texts together, and images of one size."""
        while waiting := [row for row in rows if self._fed[row]]:
            texts = [row for row in waiting if isinstance(self._fed[row][0], list)]
            images: dict[torch.Size, dict[int, Tensor]] = {}
            for row in waiting:
                if isinstance(segment := self._fed[row][0], Tensor):
                    images.setdefault(segment.shape, {})[row] = segment.to(self.device)
            if texts:
                self._read_texts(texts)
            for of_size in images.values():
                for row in of_size:
                    del self._fed[row][0]
                self.read_images(list(of_size), torch.stack(list(of_size.values())), 0.0)

    def _read_texts(self, rows: list[int]) -> None:
        texts = [np.array(self._fed[row].pop(0)) for row in rows]
        lengths = self._lengths(rows)
        positions = [self._counters[row].text(len(ids))[1] for row, ids in zip(rows, texts, strict=True)]
        # A filler is seen by no token of its row, and written over by what comes next.
        text_ids, rope_positions = padded(texts, self.device), padded(positions, self.device)
        window = self.cache.window(lengths, text_ids.shape[1], True, self._index(rows), self._longest(rows))
        with self._uncompiled():
            self.model(text_ids, None, None, None, None, None, rope_positions, cache=window)

    def read_images(self, rows: list[int], latents: Tensor, timestep: float) -> None:
        """Read an image into each of the rows: latents [B, C, Y, X] with the noise of that timestep."""
        lengths = self._lengths(rows)
        rope_positions = self._patch_positions([self._counters[row] for row in rows], latents.shape)
        patches = rope_positions.shape[1]
        window = self.cache.window(lengths, patches, self._causal, self._index(rows), self._longest(rows))
        timesteps = torch.full((len(rows), 1), timestep, dtype=latents.dtype, device=self.device)
        with self._uncompiled():
            self.model(
                None, latents[:, None].to(self.model.dtype), timesteps, None, None, None, rope_positions, cache=window
            )

    def denoiser(self, rows: list[int], noisy_latents: Tensor) -> Callable[[Tensor, float], Tensor]:
        """The next image of these rows, as a function: noisy latents [B, C, Y, X], timestep => prediction.

        The prediction is [len(rows), C, Y, X]: for all B images with the first B rows, then with the next B, and so on.

        Each call forwards the patches alone, and writes them over those of the last call: no image is read by it.

        Args:
            rows: Whose next image it is; all that was fed to them has been read.
            noisy_latents: Of the shape and number format of those to come.
        """
        model, cache, causal = self.model, self.cache, self._causal
        lengths, index = self._lengths(rows), self._index(rows)
        # Copies: the image is not in the document yet.
        rope_positions = self._patch_positions([copy.copy(self._counters[row]) for row in rows], noisy_latents.shape)
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
            window = cache.window(state["lengths"], patches, causal, state.get("rows"), end)
            images = state["noisy_latents"].to(model.dtype)
            images = images.repeat(len(rows) // len(images), 1, 1, 1)[:, None]
            timesteps = state["timestep"].expand(len(rows), 1)
            output = model(None, images, timesteps, None, None, None, state["rope_positions"], cache=window)
            assert output.prediction is not None
            return output.prediction[:, 0].to(state["noisy_latents"].dtype)

        step = self.workspace.step("denoise", body, state)

        @torch.no_grad()
        def predict(noisy_latents: Tensor, timestep: float) -> Tensor:
            step.fill(noisy_latents=noisy_latents, timestep=timestep)
            # A solver may keep predictions; the next call writes over this one.
            return step().clone()

        return predict

    @torch.no_grad()
    def write(
        self,
        rows: list[int],
        forbidden: Tensor,
        ends: list[int],
        decoding: Decoding,
        uniform: Tensor,
    ) -> list[list[int]]:
        """Write tokens into rows, each until one of `ends` => what was written, with the one that ended it.

        Args:
            rows: To write in. Something must have been fed to each since it was last read.
            forbidden: Bool [B, V], tokens that a row may not write.
            ends: Tokens behind which a row goes on in another way, or not at all; they are not read.
            decoding: How tokens are chosen.
            uniform: [B, steps] numbers in [0, 1), of which a row uses one for each token; so many are written at most.
        """
        model, cache = self.model, self.cache
        held_back = [self._hold_back(row) for row in rows]
        self.read(rows)
        steps = uniform.shape[1]
        index = self._index(rows)
        state = {
            "lengths": self._lengths(rows),
            "positions": torch.tensor([self._counters[row].position for row in rows], device=self.device),
            "step": torch.zeros(1, dtype=torch.long, device=self.device),
            # Behind the token that is read first; -1 where nothing is written yet.
            "written": torch.full((len(rows), 1 + steps), -1, device=self.device),
            "uniform": uniform.to(self.device),
            "forbidden": forbidden.to(self.device),
        }
        state["written"][:, 0] = torch.tensor(held_back, device=self.device)
        if index is not None:
            state["rows"] = index
        few_rows = FewRows(model, cache)
        by_kernels = few_rows.serves(len(rows))
        if by_kernels:
            state |= few_rows.state(state["positions"], steps)
        axes = 1 if model.architecture.rope == "1d" else 3
        end = self.workspace.end(self._longest(rows) + steps)

        def read(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
            window = cache.window(state["lengths"] + state["step"], 1, True, state.get("rows"), end)
            rope_positions = (state["positions"] + state["step"])[:, None]
            if axes > 1:
                rope_positions = rope_positions[..., None].expand(-1, -1, axes)
            output = model(tokens, None, None, None, None, None, rope_positions, cache=window)
            assert output.logits is not None
            return output.logits[:, 0]

        def body(state: dict[str, Tensor]) -> Tensor:
            tokens = state["written"].index_select(1, state["step"])
            logits = few_rows.logits(tokens[:, 0], state) if by_kernels else read(state, tokens)
            logits = logits.masked_fill(state["forbidden"], -math.inf)
            chosen = choose_tokens(logits, decoding, state["uniform"].index_select(1, state["step"])[:, 0])
            # Rows that have ended go on, too: what they write is cut off, and where they do, nobody reads.
            state["step"].add_(1)
            state["written"].index_copy_(1, state["step"], chosen[:, None])
            return chosen

        step = self.workspace.step(("write", decoding), body, state)
        written_ids, end_ids = step.state["written"][:, 1:], torch.tensor(ends, device=self.device)
        for done in range(1, steps + 1):
            step()
            if done % _TOKENS_BETWEEN_CHECKS == 0 and done < steps and torch.isin(written_ids, end_ids).any(1).all():
                break
        written = []
        for row, ids in zip(rows, written_ids.tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(ids) if token in ends), steps)
            self._counters[row].text(length)
            written.append(ids[:length])
        return written

    def _hold_back(self, row: int) -> int:
        """The last token fed to a row, which is read when the next one is written."""
        last = self._fed[row][-1]
        assert isinstance(last, list)
        *before, token = last
        self._fed[row][-1:] = [before] if before else []
        return token

    @property
    def _causal(self) -> bool:
        return self.model.architecture.image_attention == "causal"

    def _patch_positions(self, counters: list[PositionCounter], latents: torch.Size) -> Tensor:
        """Rotary positions of the next image of each document; the counters pass it."""
        patch_size = self.model.architecture.patch_size
        height, width = latents[-2] // patch_size, latents[-1] // patch_size
        return padded([counter.image(height, width)[1] for counter in counters], self.device)

    def _lengths(self, rows: list[int]) -> Tensor:
        return torch.tensor([self._counters[row].order for row in rows], device=self.device)

    def _index(self, rows: list[int]) -> Tensor | None:
        return None if rows == list(range(len(rows))) else torch.tensor(rows, device=self.device)

    def _longest(self, rows: list[int]) -> int:
        return max(self._counters[row].order for row in rows)

    def _uncompiled(self) -> contextlib.AbstractContextManager[object]:
        """For what is read once: its shapes are many, and each would be compiled anew."""
        compiled = self.model.blocks[0]._compiled_call_impl is not None
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
