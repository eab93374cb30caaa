"""The attention mask against a double loop and PyTorch's block masks, and the KV cache."""

import pytest
import torch
from conftest import data_config, numbered_images, packer_of, sources_of
from torch.nn.attention.flex_attention import create_block_mask

from transfusion_mot.errors import UserError
from transfusion_mot.models.attention import (
    KVCache,
    SlotIds,
    attention_kernel,
    block_mask,
    cached_attention,
    dense_mask,
    joint_attention,
)

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

BF16 = torch.bfloat16


def slot_ids(slots: list[list[tuple[int, int, int]]]) -> SlotIds:
    return SlotIds.from_spans(*torch.tensor(slots).permute(2, 0, 1))


def loop_mask(queries: list[tuple[int, int, int]], keys: list[tuple[int, int, int]]) -> list[list[bool]]:
    return [
        [
            dq == dk and (ok <= oq or (sq == sk and sq != -1)) if dq >= 0 else i == j  # padding sees itself alone
            for j, (dk, ok, sk) in enumerate(keys)
        ]
        for i, (dq, oq, sq) in enumerate(queries)
    ]


@st.composite
def documents(draw) -> list[tuple[int, int, int]]:
    """Slots of whole documents in any layout: (document, order, span), padding among them."""
    slots, span = [], 0
    for document in range(draw(st.integers(0, 3))):
        order = 0
        for patches in draw(st.lists(st.integers(0, 3), max_size=4)):
            # 0 is a token of text, else an image of that many patches.
            slots += [(document, order + p, span if patches else -1) for p in range(max(1, patches))]
            order, span = order + max(1, patches), span + bool(patches)
    slots += [(-1, 0, -1)] * draw(st.integers(0, 3))
    return draw(st.permutations(slots))


@given(documents().filter(bool))
@settings(max_examples=100)
def test_mask_of_real_documents(slots) -> None:
    mask = dense_mask(slot_ids([slots]), slot_ids([slots]))[0]
    assert mask.tolist() == loop_mask(slots, slots)
    for q, (document, order, span) in enumerate(slots):
        assert mask[q, q], "every slot sees itself, so that no softmax is empty"
        for k, (other, earlier, its_span) in enumerate(slots):
            if document != other or document < 0:
                assert mask[q, k] == (q == k)
            else:
                assert mask[q, k] == (earlier <= order or (span >= 0 and its_span == span))


@given(documents().filter(lambda slots: any(document >= 0 for document, _, _ in slots)), st.data())
@settings(max_examples=100)
def test_mask_of_one_image_against_everything(slots, data) -> None:
    """As in a denoising step: patches of one image have the same mask alone as among all slots."""
    spans = sorted({span for document, _, span in slots if document >= 0})
    chosen = data.draw(st.sampled_from(spans))
    # Spans count the images of a call.
    renamed = {chosen: 0, 0: chosen} if chosen > 0 else {}
    slots = [(document, order, renamed.get(span, span)) for document, order, span in slots if document >= 0]
    queries = [slot for slot in slots if slot[2] == min(chosen, 0)]
    assert dense_mask(slot_ids([queries]), slot_ids([slots]))[0].tolist() == loop_mask(queries, slots)


def test_rows_of_a_batch_have_their_own_mask() -> None:
    rows = [[(0, 0, -1), (0, 1, -1)], [(0, 0, 1), (0, 1, 1)]]
    assert dense_mask(slot_ids(rows), slot_ids(rows)).tolist() == [loop_mask(row, row) for row in rows]


def packed_slots(rows: int, length: int, clean: bool, seed: int) -> SlotIds:
    """Rows of documents of any lengths, text before patches as in a batch, and padding; with images to be seen or not.

    The first row is one document.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    batch = []
    for row in range(rows):
        slots: list[tuple[int, int, int]] = []
        document, order, span = 0, 0, 0
        for _ in range(100):
            is_image = drawn(2) == 1
            size = 1 + drawn(length // 2 + 1)
            slots += [(document, order + i, span if is_image else -1) for i in range(size)]
            order, span = order + size, span + is_image
            if row and drawn(2):
                document, order = document + 1, 0
        slots = slots[: length - drawn(length // 4 + 1)]
        slots += [(-1, 0, -1)] * (length - len(slots))
        batch.append(sorted(slots, key=lambda slot: (slot[0] < 0, slot[2] >= 0)))
    copies = torch.rand(rows, 100, generator=generator) < 0.5 if clean else None
    return SlotIds.from_spans(*torch.tensor(batch).permute(2, 0, 1), copies)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 600), (1, 4096), (4, 1024), (3, 128), (3, 129), (2, 100), (1, 1)])
def test_block_mask_is_that_of_pytorch(rows: int, length: int, clean: bool) -> None:
    slots = packed_slots(rows, length, clean, seed=length)
    with torch.compiler.set_stance("force_eager"):
        mask = block_mask(slots)
    dense = dense_mask(slots, slots)
    expected = create_block_mask(lambda b, h, q, k: dense[b, q, k], rows, None, length, length, "cpu")
    assert (mask.shape, mask.seq_lengths, mask.BLOCK_SIZE) == (expected.shape, (length, length), (128, 128))
    for side in ("kv", "q"):
        for name in (f"{side}_num_blocks", f"{side}_indices", f"full_{side}_num_blocks", f"full_{side}_indices"):
            found, wanted = getattr(mask, name), getattr(expected, name)
            assert torch.equal(found, wanted), name
            assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride()), name
    if length >= 600:
        partial, full = int(expected.kv_num_blocks.sum()), int(expected.full_kv_num_blocks.sum())
        empty = expected.kv_indices.numel() - partial - full
        assert min(partial, full, empty) > 0, "all three kinds of blocks are met"


def test_padding_adds_no_more_blocks_than_it_has_on_the_diagonal(byte_tokenizer) -> None:
    """Rows of captioned images as they are packed, with nothing to fill the text slots left over."""
    captions = [f"a picture of the number {number}" for number in range(20)]
    sources = sources_of(numbered_images(captions, side=32), side=32)
    packer = packer_of(sources, byte_tokenizer, data_config(640, 4), rope="3d", lanes=2)
    ids = packer.rows(range(2), 0, packer.initial_state()[None].repeat(2, axis=0))[0].batch.slots
    padding = ids.document_ids < 0
    assert padding.float().mean() > 0.3
    slots = SlotIds.from_spans(ids.document_ids, ids.order, ids.span_ids)
    with torch.compiler.set_stance("force_eager"):
        blocks = block_mask(slots).to_dense()[:, 0]
    pairs = dense_mask(slots, slots)
    needed = (pairs & ~padding[:, None] & ~padding[:, :, None]).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    needed = needed.any(dim=4).any(dim=2)
    added = blocks.bool() & ~needed
    assert added.any(), "there are blocks of nothing but padding"
    assert not (added & ~torch.eye(added.shape[-1], dtype=torch.bool)).any()
    assert not (pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool) & padding[:, :, None]).any()


def test_what_lies_behind_the_end_of_a_row_attends_to_nobody() -> None:
    zeros = torch.zeros(1, 129, dtype=torch.long)
    with torch.compiler.set_stance("force_eager"):
        mask = block_mask(SlotIds(zeros, zeros + 1, zeros, None))
    assert not mask.to_dense().any(), "no slot sees even itself"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_joint_attention_is_a_softmax_over_what_the_mask_allows(kv_heads: int) -> None:
    torch.manual_seed(0)
    rows = [[(0, 0, -1), (0, 1, 0), (0, 2, 0), (1, 0, -1), (-1, 0, -1)]]
    mask = dense_mask(slot_ids(rows), slot_ids(rows))
    q = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, 5, 8, dtype=torch.float64)
    result = joint_attention(q, k, v, mask)
    for head in range(4):
        group = head * kv_heads // 4
        for i in range(5):
            seen = [j for j in range(5) if mask[0, i, j]]
            weights = torch.softmax(torch.stack([q[0, head, i] @ k[0, group, j] / 8**0.5 for j in seen]), 0)
            expected = sum(w * v[0, group, j] for w, j in zip(weights, seen, strict=True))
            torch.testing.assert_close(result[0, head, i], expected)


def cached(cache: KVCache, lengths: list[int], heads: torch.Tensor, causal: bool, **settings: object) -> torch.Tensor:
    """Attention of new slots whose queries, keys and values are `heads` [B, S, H], with one head."""
    window = cache.window(torch.tensor(lengths), heads.shape[1], causal, **settings)
    added = heads[:, :, None].double()
    return cached_attention(added, added, -added, window.layer(1))[:, :, 0]


def softmax_over(query: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of a query [H] to the slots [S, H] that it sees, whose values are minus their keys."""
    return -torch.softmax(seen @ query / query.shape[0] ** 0.5, 0) @ seen


@pytest.mark.parametrize("rows", [None, [2, 0, 1]])
@pytest.mark.parametrize("end", [None, 7])
def test_cached_attention_sees_its_row_up_to_itself_or_all_of_its_image(
    rows: list[int] | None, end: int | None
) -> None:
    torch.manual_seed(0)
    cache = KVCache(2, 3, 1, 4, 10, torch.device("cpu"), torch.float64)
    settings = {"rows": None if rows is None else torch.tensor(rows), "end": end}
    # Documents of one, three and two tokens, read together; then an image of three patches behind each, twice.
    lengths = [1, 3, 2]
    text, *images = (torch.randn(3, 3, 4, dtype=torch.float64) for _ in range(3))
    result = cached(cache, [0, 0, 0], text, causal=True, **settings)
    for row, length in enumerate(lengths):
        for slot in range(length):
            torch.testing.assert_close(result[row, slot], softmax_over(text[row, slot], text[row, : slot + 1]))
    for image in images:
        result = cached(cache, lengths, image, causal=False, **settings)
        for row, length in enumerate(lengths):
            seen = torch.cat([text[row, :length], image[row]])
            for slot in range(3):
                torch.testing.assert_close(result[row, slot], softmax_over(image[row, slot], seen))
    held = cache.keys[1, 0 if rows is None else rows[0], :4, 0]
    assert torch.equal(held, torch.cat([text[0, :1], images[-1][0]]))
    assert (cache.keys[0] == 0).all(), "layers do not share"


def test_filler_beyond_a_full_row_goes_to_its_last_slot() -> None:
    cache = KVCache(2, 2, 1, 4, 4, torch.device("cpu"), torch.float64)
    new = torch.ones(2, 2, 4, dtype=torch.float64)
    cached(cache, [3, 1], new, causal=True)
    assert cache.keys[1, :, :, 0, 0].tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]


def chosen(
    choice: str, device_type: str, length: int, head_dim: int = 64, dtype: torch.dtype = BF16, on_hopper: bool = False
) -> tuple[str, str]:
    return attention_kernel(choice, device_type, length, head_dim, dtype, on_hopper)


def test_kernel_is_chosen_by_device_and_length() -> None:
    assert chosen("auto", "cuda", 4096)[0] == "flex"
    assert chosen("auto", "cuda", 100)[0] == "sdpa"
    assert chosen("auto", "cpu", 4096)[0] == "sdpa"
    assert chosen("sdpa", "cuda", 4096)[0] == "sdpa"
    assert chosen("flex", "cuda", 100)[0] == "flex"
    assert "100 slots" in chosen("auto", "cuda", 100)[1]
    for choice in ("flex", "interval"):
        with pytest.raises(UserError, match=f"{choice}, which has no backward on the device 'cpu'; use auto or sdpa"):
            chosen(choice, "cpu", 4096)


def test_hopper_has_kernels_of_its_own_for_what_they_suit() -> None:
    pytest.importorskip("triton")
    assert chosen("auto", "cuda", 4096, on_hopper=True)[0] == "interval"
    assert chosen("auto", "cuda", 192, head_dim=128, on_hopper=True)[0] == "interval"
    assert chosen("auto", "cuda", 100, on_hopper=True)[0] == "sdpa"
    assert chosen("flex", "cuda", 4096, on_hopper=True)[0] == "flex"
    for other in ({"head_dim": 96}, {"dtype": torch.float32}, {"length": 4000}, {"length": 64_000}):
        kernel, reason = chosen(**{"choice": "auto", "device_type": "cuda", "length": 4096, "on_hopper": True, **other})
        assert kernel == "flex"
        assert "interval is faster for" in reason
    # Asked for, other kernels of the same kind take almost anything.
    assert chosen("interval", "cuda", 4000, head_dim=96)[0] == "interval"
    for other, message in (
        ({"head_dim": 512}, "heads of up to 256 .* model.head_dim is 512"),
        ({"head_dim": 256, "dtype": torch.float32}, "heads of up to 128"),
        ({"length": 64_000}, "up to 46,340 slots, but these have 64,000"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(**{"choice": "interval", "device_type": "cuda", "length": 4096, **other})
