"""data.inspect: its counts match the documents, and the picture shows the row."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.data.inspect import Inspection, histogram, main, thumbnails_of
from transfusion_mot.data.row_picture import draw_row
from transfusion_mot.data.sources.base import share_of
from transfusion_mot.errors import UserError

# Caption lengths in tokens, with a tokenizer of bytes.
LENGTHS = [4, 4, 4, 8, 8, 12, 5, 6, 7, 20]
IMAGE_SIZE = 16


@pytest.fixture
def folder(tmp_path, random_vae):
    (tmp_path / "images").mkdir()
    lines = []
    for number, length in enumerate(LENGTHS):
        colour = (20 * number, 255 - 20 * number, 7 * number)
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour).save(tmp_path / "images" / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": "abcdefghijklmnopqrstuvwxyz"[:length]})
    (tmp_path / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": c * 30}) + "\n" for c in "qrstuv"))
    return tmp_path


def arguments(folder, random_vae, *more, texts=False):
    sources = [f"{{kind: imagefolder, path: {folder / 'images'}}}"]
    sources += [f"{{kind: text, path: {folder / 'text.jsonl'}}}"] * texts
    return [
        *(f"data.sources=[{', '.join(sources)}]", f"data.cache_dir={folder / 'cache'}", "data.held_out_fraction=0"),
        *(f"data.image_size={IMAGE_SIZE}", "data.slots={text: 48, image: 3}", "tokenizer.vocab_size=261"),
        *(f"codecs.image.path={random_vae}", f"output_dir={folder / 'run'}", "data.random_flip=true", *more),
    ]


def inspection_of(folder, random_vae, *more, texts=False):
    return Inspection(parse_config(RunConfig, arguments(folder, random_vae, *more, texts=texts), ""))


def test_lengths_are_those_of_the_documents(folder, random_vae):
    inspection = inspection_of(folder, random_vae, texts=True)
    tokens, images = inspection.lengths(0)
    assert tokens.tolist() == LENGTHS
    assert images.tolist() == [1] * len(LENGTHS)
    tokens, images = inspection.lengths(1)
    assert tokens.tolist() == [30] * 6
    assert images.tolist() == [0] * 6


def test_a_histogram_counts_every_value_once():
    values = np.array([3] * 50 + [4] * 25 + [9] * 20 + [1000] * 5)
    heading, *lines = histogram(values, "words", num_bins=4)
    assert heading == "  words: mean 54.3, 50 % 4, 90 % 9, 99 % 1000, largest 1000"
    shares = [float(re.search(r"([\d.]+) %", line)[1]) for line in lines]
    assert sum(shares) == pytest.approx(100)
    assert max(len(line) for line in lines) < 80
    heading, *lines = histogram(np.array([1, 1, 2, 2, 2, 5]), "words")
    counts = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert counts == {"1": 33.3, "2": 50.0, "3": 0.0, "4": 0.0, "5": 16.7}


def test_padding_is_what_the_rows_leave_empty(folder, random_vae):
    inspection = inspection_of(folder, random_vae)
    counts, batch, num_slots = inspection.pack(inspection.data, 40)
    assert num_slots == 40 * (48 + 3 * 4)
    assert batch.slots.order.shape == (8, 48 + 3 * 4)
    assert counts["text_slots"] + 4 * counts["image_items"] + counts["pad_slots"] == num_slots
    layout = inspection.layout({"text": 48, "image": 3}, 40)
    assert layout.pad_fraction == counts["pad_slots"] / num_slots
    # Two captions in ten are longer than eight tokens, and one prompt in ten is dropped.
    assert inspection.layout({"text": 12, "image": 3}, 400).cut_fraction == pytest.approx(0.2 * 0.92, abs=0.04)
    with_texts = inspection_of(folder, random_vae, texts=True)
    assert with_texts.layout({"text": 48, "image": 3}).pad_fraction < 0.02


def test_suggested_layouts_keep_the_budget_and_begin_with_the_best(folder, random_vae):
    inspection = inspection_of(folder, random_vae)
    layouts = inspection.suggested(160, 24, 16.0)
    assert len(layouts) > 3
    assert all(120 <= layout.slots["text"] + 4 * layout.slots["image"] <= 160 for layout in layouts)
    assert all(layout.slots["text"] >= 24 for layout in layouts)
    pads = [layout.pad_fraction for layout in layouts]
    assert pads == sorted(pads)
    assert pads[0] < inspection.layout({"text": 96, "image": 2}).pad_fraction
    assert inspection.suggested(20, 24, 12.0) == []
    clean = inspection_of(folder, random_vae, "data.image_context=clean").suggested(160, 24, 16.0)
    assert min(layout.slots["image"] for layout in clean) >= 2
    assert all(layout.mean_media < layout.slots["image"] for layout in clean), "copies are no images"
    half = inspection_of(folder, random_vae, texts=True).suggested(96, 24, 12.0)[0]
    assert (half.slots["text"] + 4 * half.slots["image"], half.slots["image"]) == (96, 12)


@pytest.mark.parametrize("image_context", ["noised", "clean"])
def test_thumbnails_are_the_images_of_the_row(folder, random_vae, image_context):
    inspection = inspection_of(folder, random_vae, f"data.image_context={image_context}")
    _, batch, _ = inspection.pack(inspection.data, 8)
    for row in batch.split(1):
        thumbnails = thumbnails_of(row, inspection.sources, inspection.config.model)["image"]
        ids, documents = row.tokens("text").ids[0], row.slots.document_ids[0]
        captions = {
            inspection.tokenizer.decode(ids[documents[:48] == document].tolist())
            for document in range(int(documents.max()) + 1)
        }
        for slot, thumbnail in enumerate(thumbnails):
            assert (thumbnail is not None) == bool(row.slots.document_ids[0, 48 + 4 * slot] >= 0)
            if thumbnail is not None:
                number = int(thumbnail[0, 0, 0]) // 20
                # Without a caption where the prompt was dropped.
                assert {"abcdefghijklmnopqrstuvwxyz"[: LENGTHS[number]], ""} & captions


@pytest.mark.parametrize("image_context", ["noised", "clean"])
def test_the_picture_has_the_mask_and_the_images_in_it(folder, random_vae, image_context):
    clean = image_context == "clean"
    more = f"data.image_context={image_context}", "data.caption_first_prob=0.5"
    inspection = inspection_of(folder, random_vae, *more, texts=True)
    _, batch, _ = inspection.pack(inspection.data, 8)
    rows = batch.split(1)
    row = next(row for row in rows if row.latents("image").copies.any()) if clean else rows[0]
    green = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), (1, 250, 3), dtype=np.uint8)
    draw_row(
        row,
        inspection.config.model,
        inspection.tokenizer,
        thumbnails={"image": [green] * 3},
        title="a row",
        path=folder / "row.png",
    )
    pixels = np.asarray(Image.open(folder / "row.png"))
    assert pixels.shape[1] == 2000
    assert (pixels == (1, 250, 3)).all(axis=-1).sum() > 3 * 100 * 100
    # The square, found by what nobody attends to; every cell of it against a double loop over the slots as one reads.
    faint = (pixels == 250).all(axis=-1)
    lines, columns = np.flatnonzero(faint.sum(1) > 100), np.flatnonzero(faint.sum(0) > 100)
    square = pixels[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
    ids, order, spans = (getattr(row.slots, name)[0].tolist() for name in ("document_ids", "order", "span_ids"))
    slots = sorted((slot for slot, document in enumerate(ids) if document >= 0), key=lambda s: (ids[s], order[s]))
    text, text_to_image, image_to_text, image = (52, 101, 164), (158, 190, 228), (249, 200, 158), (232, 126, 46)
    right = hidden_cells = 0
    for y, q in enumerate(slots):
        for x, k in enumerate(slots):
            is_hidden = clean and spans[k] >= 0 and not row.latents("image").copies[0, spans[k]]
            before = ids[q] == ids[k] and (order[k] <= order[q] or spans[q] == spans[k] >= 0)
            attends = before and (spans[q] == spans[k] or not is_hidden)
            colours = ((text, text_to_image), (image_to_text, image))[spans[q] >= 0]
            expected = colours[spans[k] >= 0] if attends else (250, 250, 250)
            centre = (np.array([y, x]) + 0.5) * square.shape[:2] / len(slots)
            is_right = tuple(square[tuple(centre.astype(int))]) == expected
            right += is_right
            hidden_cells += is_right and before and not attends
    assert (hidden_cells > 0) == clean
    assert right > 0.97 * len(slots) ** 2, "but for the numbers of the documents, which lie over some cells"


def test_the_command_prints_and_draws(folder, random_vae, capsys):
    picture = folder / "pictures" / "row.png"
    main(["--rows", "16", "--slots", "100", "--picture", str(picture), *arguments(folder, random_vae, texts=True)])
    output = capsys.readouterr().out
    assert "tokens a caption: mean 7.8" in output
    assert "packed 16 rows of 48 text tokens + 3 image slots of 4 patches" in output
    assert re.search(r"\d\.\d\d % of the slots are padding", output)
    assert "layouts of at most 100 slots a row" in output
    assert Image.open(picture).format == "PNG"
    assert not list((folder / "cache").glob("latents-*")), "nothing is encoded"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--picture", "row.foo"], r"--picture is 'row\.foo'; its name must end like a picture's"),
        (["--rows", "0"], "--rows is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_the_work(folder, random_vae, given, message):
    with pytest.raises(UserError, match=message):
        main([*given, *arguments(folder, random_vae)])
    assert not (folder / "cache").exists()


def test_a_picture_below_a_file_is_refused(folder, random_vae):
    with pytest.raises(UserError, match="cannot make the folder"):
        main(["--picture", str(folder / "text.jsonl" / "row.png"), *arguments(folder, random_vae)])


@pytest.mark.parametrize("texts", [False, True])
def test_the_command_says_what_is_held_out_cut_and_why_layouts_have_their_order(folder, random_vae, capsys, texts):
    documents = [{"texts": ["a text", *[None] * 5], "images": [None, *(f"{n}.png" for n in range(5))]}] * 4
    (folder / "images" / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    given = arguments(folder, random_vae, "data.held_out_fraction=0.5", "data.slots.text=20", texts=texts)
    given += [f"--data.sources+={{kind: interleaved, path: {folder / 'images' / 'docs.jsonl'}, use: train}}"]
    main(["--rows", "80", "--slots", "200", "--picture", str(folder / "row.png"), *given])
    output = capsys.readouterr().out
    hashed = [
        f"{number}.png" if LENGTHS.count(length) > 1 else "abcdefghijklmnopqrstuvwxyz"[:length]
        for number, length in enumerate(LENGTHS)
    ]
    held_out = sum(share_of(text, 0) < 0.5 for text in hashed)
    assert 1 < held_out < len(LENGTHS)
    assert f"held out: images: {held_out} documents" in output
    assert f"images: {len(LENGTHS) - held_out} documents to train on" in output
    assert "100.0 % have more media than the 3 of a row: they are cut" in output
    captions, cut = (
        int(number) for number in re.search(r"  \d+ of (\d+) captions are cut\n  (\d+) documents of", output).groups()
    )
    assert captions > 0
    assert cut > 0
    assert ("texts fill the remaining slots, so nothing is padding" in output) == texts


def test_an_image_size_without_whole_patches_is_refused(folder, random_vae):
    with pytest.raises(UserError, match="image_size is 20; it must be a multiple of 8"):
        inspection_of(folder, random_vae, "data.image_size=20")
