"""Composed scenes: pure functions of seed and number, correct captions, and held-out pairs."""

import colorsys
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHANNELS, data_config, loader_of, packer_of
from diffusers import VQModel
from PIL import Image
from scene_sprites import make_sprites

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.base import Codec
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import CodecConfig, DataConfig, RunConfig, SourceConfig, parse_config
from transfusion_mot.data import mixture
from transfusion_mot.data.colours import COLOURS, main_colour, recoloured
from transfusion_mot.data.emoji_corpus import Icon
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.mixture import Sources, open_documents, training_texts, with_encoded
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.scene_composer import Composer
from transfusion_mot.data.scene_drawing import boxes_of, draw_scene
from transfusion_mot.data.scene_objects import object_of_drawing, plural_of, scene_objects, with_article
from transfusion_mot.data.scenes import Group, Place, Scene
from transfusion_mot.data.sources.base import Split
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.data.sources.scenes import Scenes
from transfusion_mot.data.sprites import Sprites, drawing_names
from transfusion_mot.errors import UserError

FRACTION, SEED = 0.15, 3
NUMBERS = {"two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sprites(tmp_path_factory.mktemp("scenes"))


def data_of(folder: Path, **changes) -> DataConfig:
    num_items = changes.pop("num_items", None)
    use = changes.pop("use", "split")
    source = SourceConfig("scenes", path=str(folder), num_items=num_items, use=use)
    settings = {
        "sources": [source],
        "image_size": 48,
        "held_out_fraction": FRACTION,
        "split_seed": SEED,
        "latents": "online",
        "cache_dir": str(folder.parent / "cache"),
        "num_workers": 0,
    }
    return data_config(60, 3, **(settings | changes))


def scenes_of(folder: Path, split: str = "train", **changes) -> Scenes:
    data = data_of(folder, **changes)
    opened = open_source(data.sources[0], data, split)
    assert isinstance(opened, Scenes)
    return opened


def digest(scenes: Scenes, numbers) -> str:
    content = b"".join(scenes.image(n).tobytes() + repr(scenes.captions(n)).encode() for n in numbers)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.slow
def test_an_item_follows_from_the_seed_and_its_number_in_every_process(folder: Path) -> None:
    numbers = [*range(12), 9_999_999]
    here = digest(scenes_of(folder), numbers)
    other = scenes_of(folder)
    # In another order, too.
    images = {number: other.image(number) for number in reversed(numbers)}
    assert all((scenes_of(folder).image(number) == images[number]).all() for number in numbers[:3])
    assert digest(pickle.loads(pickle.dumps(scenes_of(folder))), numbers) == here
    assert digest(scenes_of(folder, split_seed=4), numbers) != here
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\nfrom test_scenes import digest, scenes_of\n"
        f"print(digest(scenes_of(Path({str(folder)!r})), {numbers}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert there.stdout.strip() == here


def held_out_pairs(folder: Path) -> set[tuple[str, ...]]:
    """By the definition: a hash of each pair, except colours that a training drawing of the thing has."""
    entries = [json.loads(line) for line in (folder / "sprites.jsonl").read_text().splitlines()[1:]]
    sprites = Sprites(folder).sprites
    natural, nouns = set(), set()
    for entry, sprite in zip(entries, sprites, strict=True):
        if not entry["is_held_out"] and (thing := object_of_drawing(entry["name"])):
            nouns.add(thing[0])
            natural.add((thing[0], thing[1] or sprite.main.name))
    pairs = [("together", *sorted((one, two))) for one in nouns for two in nouns if one < two]
    pairs += [("colour", noun, name) for noun in nouns for name in COLOURS if (noun, name) not in natural]

    def share(pair: tuple[str, ...]) -> float:
        text = f"{SEED}\n" + "\n".join(pair)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64

    return {pair for pair in pairs if share(pair) < FRACTION}


def pairs_in(scene: Scene) -> set[tuple[str, ...]]:
    nouns = sorted({group.noun for group in scene.groups})
    pairs: set[tuple[str, ...]] = {("together", one, two) for one in nouns for two in nouns if one < two}
    return pairs | {("colour", group.noun, group.paint.name) for group in scene.groups if group.paint is not None}


def test_held_out_pairs_and_drawings_are_in_no_training_scene(folder: Path) -> None:
    held_out, sprites = held_out_pairs(folder), Sprites(folder).sprites
    assert {pair[0] for pair in held_out} == {"together", "colour"}
    hidden = {number for number, sprite in enumerate(sprites) if sprite.is_held_out}
    assert hidden
    training, rest = scenes_of(folder), scenes_of(folder, "held_out")
    for number in range(4000):
        scene = training.scene(number)
        assert not pairs_in(scene) & held_out
        assert not hidden & {group.sprite for group in scene.groups}
    framed = 0
    for number in range(len(rest) // 4):
        scene = rest.scene(number)
        framed += scene.is_framed
        assert {scene.groups[0].sprite} <= hidden if scene.is_framed else pairs_in(scene) & held_out
    assert framed
    # Without the rule they would be there.
    composer = Composer(sprites, seed=SEED, held_out_fraction=FRACTION, is_split=False)
    everything = [composer.scene(number, "train") for number in range(500)]
    assert any(pairs_in(scene) & held_out for scene in everything)


def test_use_puts_all_scenes_on_one_side(folder: Path) -> None:
    assert len(scenes_of(folder, use="train", num_items=50)) == 50
    assert len(scenes_of(folder, "held_out", use="train")) == 0
    held_out = scenes_of(folder, "held_out", use="held_out", num_items=50)
    assert len(held_out) == 50
    assert any(not pairs_in(held_out.scene(number)) & held_out_pairs(folder) for number in range(20))


def read_caption(caption: str) -> tuple[list[tuple[int, str | None, str | None, str]], str | None]:
    """Parse a caption independently => (count, size, colour, noun) of its things in order, and the relation."""
    names = {noun: thing.noun for thing in scene_objects() for noun in thing.nouns}
    names |= {plural_of(noun): thing for noun, thing in names.items()}
    longest = sorted(map(re.escape, names), key=len, reverse=True)
    sizes, colours = "small|big", "|".join(COLOURS)
    found = []
    ground = re.search(r",? (on an? )?(light )?\w+( and (light )?\w+)?( \w+)? background", caption)
    text = caption.lower() if ground is None else caption[: ground.start()].lower()
    pattern = (
        rf"\b(?:(an?|two|three|four) )?(?:({sizes}) )?(?:({colours}) )?"
        rf"(?:(?:openmoji|twemoji|noto v1|noto|fluent flat|fluent|emojione v1|emojione|fxemoji|streamline) )?"
        rf"({'|'.join(longest)})\b"
    )
    for count, size, colour, noun in re.findall(pattern, text):
        found.append((NUMBERS.get(count, 1), size or None, colour or None, names[noun]))
    relation = None
    for words, meaning in (
        ("on the left and", "left of"),
        ("on the right and", "right of"),
        ("left of", "left of"),
        ("right of", "right of"),
        ("above|over", "above"),
        ("below|under", "below"),
    ):
        if len(found) == 2 and relation is None and re.search(rf"\b({words})\b", text):
            relation = meaning
    return found, relation


def test_captions_say_what_is_in_the_record(folder: Path) -> None:
    scenes = scenes_of(folder)
    sprites = Sprites(folder)
    relations = set()
    for number in range(1500):
        scene = scenes.scene(number)
        if scene.is_framed:
            continue
        by_noun = {group.noun: group for group in scene.groups}
        wanted = sorted((len(group.places), group.size or "", group.colour or "", group.noun) for group in scene.groups)
        for caption in scene.captions:
            found, relation = read_caption(caption)
            assert sorted((c, size or "", colour or "", noun) for c, size, colour, noun in found) == wanted, caption
            assert scene.background.words in caption
            assert ("background" in caption) == bool(scene.background.words)
            if relation is not None:
                first, second = (boxes_of(by_noun[entry[3]], sprites, (480, 480)) for entry in found)
                for one in first:
                    for two in second:
                        sides = {
                            "left of": one[2] <= two[0],
                            "right of": two[2] <= one[0],
                            "above": one[3] <= two[1],
                            "below": two[3] <= one[1],
                        }
                        assert sides[relation], caption
                relations.add(relation)
    assert relations == {"left of", "right of", "above", "below"}


def test_drawings_do_not_overlap_and_lie_in_the_picture(folder: Path) -> None:
    scenes, sprites = scenes_of(folder), Sprites(folder)
    for number in range(600):
        scene = scenes.scene(number)
        if scene.is_framed:
            continue
        covered = np.zeros((480, 480), dtype=np.int32)
        for box in (box for group in scene.groups for box in boxes_of(group, sprites, (480, 480))):
            left, top, right, bottom = box
            assert left >= -1
            assert top >= -1
            assert right <= 481
            assert bottom <= 481
            covered[max(0, top) : bottom, max(0, left) : right] += 1
        assert covered.max() == 1, scene


def nearest_colour(pixel: np.ndarray) -> str:
    """The name whose typical colour is nearest in RGB."""

    def distance(name: str) -> float:
        hue, saturation, value = COLOURS[name]
        rgb = 255 * np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value))
        return float(((rgb - pixel) ** 2).sum())

    return min(COLOURS, key=distance)


def test_things_have_the_colour_that_is_said(folder: Path) -> None:
    """The middle pixel of each drawing, as the flat shapes of the test have it everywhere."""
    scenes, sprites = scenes_of(folder, image_size=96), Sprites(folder)
    seen = set()
    for number in range(400):
        scene = scenes.scene(number)
        picture = scenes.image(number)
        for group in (group for group in scene.groups if group.paint is not None):
            for left, top, right, bottom in boxes_of(group, sprites, (96, 96)):
                pixel = picture[(top + bottom) // 2, (left + right) // 2]
                assert nearest_colour(pixel.astype(float)) == group.colour == group.paint.name
                seen.add(group.colour)
    assert seen == set(COLOURS)


def test_main_colour_and_its_replacement() -> None:
    drawing = np.zeros((40, 40, 4), dtype=np.uint8)
    drawing[4:36, 4:36] = (200, 30, 40, 255)
    drawing[4:36, 4:8] = (10, 10, 10, 255)  # an outline, which is no part of the area
    drawing[20:36, 8:16] = (250, 250, 250, 255)
    shaded = Image.fromarray(drawing)
    main = main_colour(shaded)
    hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 30 / 255, 40 / 255)
    assert main.hue == pytest.approx(hue * 256, abs=1.5)
    assert (main.saturation / 255, main.value / 255) == pytest.approx((saturation, value), abs=0.01)
    area = 32 * 28
    assert main.share == pytest.approx((area - 16 * 8) / area, abs=2e-3)
    assert main.name == "red"
    blue = np.array(recoloured(shaded, main, COLOURS["blue"]))
    assert nearest_colour(blue[10, 30, :3].astype(float)) == "blue"
    changed = (blue != drawing).any(axis=-1)
    assert changed[10, 30]
    assert not changed[10, 5]
    assert not changed[30, 10]
    assert (blue[..., 3] == drawing[..., 3]).all()
    grey = np.full((8, 8, 4), 255, dtype=np.uint8) // 2
    grey[..., 3] = 255
    assert main_colour(Image.fromarray(grey)).share == 0
    assert not main_colour(Image.fromarray(grey)).is_replaceable


def test_a_framed_drawing_is_the_icon_on_white(folder: Path) -> None:
    scenes, sprites = scenes_of(folder), Sprites(folder)
    number = next(number for number in range(100) if scenes.scene(number).is_framed)
    drawing = sprites.picture(scenes.scene(number).groups[0].sprite)
    expected = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    assert np.abs(np.asarray(expected).astype(int) - scenes.image(number).astype(int)).max() <= 1


def test_scenes_fill_the_middle_of_pictures_that_are_not_square(folder: Path) -> None:
    scenes, sprites = scenes_of(folder), Sprites(folder)
    scene = next(scene for scene in map(scenes.scene, range(100)) if not scene.is_framed and len(scene.groups) == 1)
    assert draw_scene(scene, sprites, (48, 80)).shape == (48, 80, 3)
    tall = boxes_of(scene.groups[0], sprites, (80, 48))
    assert [(left, top - 16) for left, top, _, _ in tall] == [
        (left, top) for left, top, _, _ in boxes_of(scene.groups[0], sprites, (48, 48))
    ]


@pytest.mark.parametrize(
    ("noun", "many", "one"),
    [
        ("apple", "apples", "an apple"),
        ("fox", "foxes", "a fox"),
        ("ear of corn", "ears of corn", "an ear of corn"),
        ("pair of scissors", "pairs of scissors", "a pair of scissors"),
        ("sun with a face", "suns with a face", "a sun with a face"),
        ("bow and arrow", "bows and arrows", "a bow and arrow"),
        ("strawberry", "strawberries", "a strawberry"),
        ("monkey", "monkeys", "a monkey"),
        ("computer mouse", "computer mice", "a computer mouse"),
        ("unicorn", "unicorns", "a unicorn"),
        ("hourglass", "hourglasses", "an hourglass"),
        ("UFO", "UFOs", "a UFO"),
        ("sheep", "sheep", "a sheep"),
    ],
)
def test_nouns(noun: str, many: str, one: str) -> None:
    assert plural_of(noun) == many
    assert with_article(noun) == one


def test_nouns_name_one_thing_each() -> None:
    nouns = [noun for thing in scene_objects() for noun in thing.nouns]
    assert len(nouns) == len(set(nouns))
    drawings = [name for thing in scene_objects() for name in thing.drawings]
    assert len(drawings) == len(set(drawings))


def test_drawings_are_named_as_most_sets_name_them(folder: Path) -> None:
    icons = [
        Icon("noto", "alarm-clock", ""),
        Icon("fxemoji", "alarmclock", ""),
        Icon("streamline-emojis", "bird-2", ""),
        Icon("fluent-emoji", "artist", ""),
        Icon("fluent-emoji", "artist-medium-dark", ""),
        Icon("noto", "artist-light-skin-tone", ""),
        Icon("noto", "traffic-light", ""),
    ]
    names = {icon.icon: name for icon, name in drawing_names(icons).items()}
    assert names == {
        "alarm-clock": "alarm clock",
        "alarmclock": "alarm clock",
        "bird-2": "bird",
        "artist": "artist",
        "traffic-light": "traffic light",
    }
    assert "woman artist" in {sprite.name for sprite in Sprites(folder).sprites}
    assert not any("skin" in sprite.name for sprite in Sprites(folder).sprites)


def test_a_trillion_items_open_at_once_and_count(byte_tokenizer, folder: Path, monkeypatch) -> None:
    """Nothing has the length of the source; what a lane remembers is enough to go on."""
    monkeypatch.setattr(mixture, "_NUM_TOKENIZER_SCENES", 40)
    data = data_of(folder, num_items=10**12)
    documents = open_documents(data, "train")
    assert len(list(training_texts(documents))) < 500
    sources = Sources(documents, {"image": [(CHANNELS, 6, 6)]}, all_documents=True)
    assert sources.num_media_documents() == 10**12
    assert sources.epochs({"sources/sprites/taken": 10**11}) == {"sprites": 0.1}
    other = Sources(open_documents(data_of(folder, num_items=10**11), "train"), {"image": [(CHANNELS, 6, 6)]})
    assert other.contents() != sources.contents()

    def packer():
        return packer_of(sources, byte_tokenizer, data, lanes=2)

    whole = [r.media["image"] for r in steps(packer(), 4)]
    states: list[np.ndarray] = []
    steps(packer(), 2, states)
    again = steps(packer(), 4, first=2, state=states[-1])
    assert all(torch.equal(one, two.media["image"]) for one, two in zip(whole[2:], again, strict=True))
    assert not torch.equal(whole[0], whole[2])


def steps(packer, number: int, states: list | None = None, first: int = 0, state=None) -> list:
    """The rows of both lanes of some steps; `states` receives their states after each step."""
    state = np.stack([packer.initial_state()] * 2) if state is None else state
    made = []
    for step in range(first, number):
        rows, state, _ = packer.rows([0, 1], step, state)
        made.append(rows)
        if states is not None:
            states.append(state)
    return made


def test_batches_are_encoded_while_training(byte_tokenizer, random_vae: Path, folder: Path) -> None:
    data = data_of(folder)
    autoencoder = Autoencoder.load(str(random_vae), "cpu")
    documents = open_documents(data, "train")
    sources = with_encoded(documents, data, {"image": autoencoder}, {"image": CodecConfig()}, all_documents=True)
    packer = packer_of(sources, byte_tokenizer, data, rope="3d", lanes=2)
    encoder = OnlineEncoder({"image": autoencoder}, {"image": 8})
    batches = [batch for batch, _ in loader_of(packer, 2, num_workers=2, encoder=encoder)]
    for images in (batch.latents("image") for batch in batches):
        assert torch.equal(images.latents.flatten(2).abs().sum(dim=2) > 0, images.mask)
        assert images.mask.any(dim=1).all()


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_a_number_of_scenes_is_stored_once(kind: str, random_vae: Path, folder: Path, tmp_path: Path) -> None:
    """What is stored of item i is what the codec makes of its picture; more items add to it."""
    codec: Codec = Autoencoder.load(str(random_vae), "cpu")
    if kind == "codes":
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        vq = VQModel(**blocks, block_out_channels=(8, 8, 8), latent_channels=4, num_vq_embeddings=24, norm_num_groups=4)
        vq.save_pretrained(tmp_path / "vq")
        codec = load_codec(CodecConfig(str(tmp_path / "vq")), "next_token", torch.device("cpu"))

    def stored(num_items: int, split: Split) -> Any:
        data = data_of(folder, num_items=num_items, latents="cache", cache_dir=str(tmp_path / "cache"))
        documents = open_documents(data, split)
        (source,) = with_encoded(documents, data, {"image": codec}, {"image": CodecConfig()}).sources
        return source.encoded["image"]

    first = stored(12, "train")
    scenes = scenes_of(folder, num_items=15)
    pictures = [scenes.image(number).tobytes() for number in range(15)]
    assert first.num_encoded == 12
    for number in (0, 5, 11):
        pixels = to_pixels(torch.from_numpy(scenes.image(number))[None])
        if kind == "codes":
            assert first.span(number) == [24, *codec.encode(pixels).flatten().tolist(), 25]
        else:
            mean = codec.encode_fast(pixels, 1, compiled=False)[0][0]
            # One picture and a batch of them may differ by a last digit, and then round to neighbouring numbers.
            torch.testing.assert_close(torch.from_numpy(first.posterior(number)[0].copy()), mean.half())
    assert stored(12, "train").num_encoded == 0
    # Of so few drawings two scenes may be the same.
    assert stored(15, "train").num_encoded == sum(new not in pictures[:12] for new in pictures[12:]) > 0
    assert stored(12, "held_out").num_encoded == 12


def test_what_cannot_be_is_refused(random_vae: Path, folder: Path, tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(str(random_vae), "cpu")
    data = data_of(folder, latents="cache")
    with pytest.raises(
        UserError, match=r"'.*sprites' of kind 'scenes' has 10,000,000 pictures.*its num_items.*online \(now cache\)"
    ):
        with_encoded(open_documents(data, "train"), data, {"image": autoencoder}, {"image": CodecConfig()})
    with pytest.raises(UserError, match=r"holds no sprites; give the folder that .*data\.sprites"):
        Sprites(tmp_path)
    source = SourceConfig("imagefolder", path=str(tmp_path), num_items=3)
    with pytest.raises(UserError, match="a source of kind 'imagefolder' has no key 'num_items'; scenes have"):
        open_source(source, data, "train")
    for number in (0, -5):
        words = [f"data.sources=[{{kind: scenes, path: {folder}, num_items: {number}}}]"]
        with pytest.raises(UserError, match=f"num_items of {number}; it must be at least 1"):
            parse_config(RunConfig, words, "")


def test_phrases() -> None:
    place = Place(0.5, 0.5, 0.2)
    assert Group(0, "octopus", (place,), size="small", colour="blue").phrase == "a small blue octopus"
    assert Group(0, "octopus", (place, place), colour="orange", style="noto").phrase == "two orange noto octopuses"
    assert Group(0, "octopus", (place,), colour="orange").phrase == "an orange octopus"
