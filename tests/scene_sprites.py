"""A folder of sprites for tests: shapes in flat colours, in all ten styles, under the names of things."""

import json
from pathlib import Path

from transfusion_mot.data.emoji_corpus import STYLES
from transfusion_mot.data.sprites import write_sprites

# Name => (shape in a box of 16, colour by number of the style).
SHAPES = {
    "octopus": '<circle cx="8" cy="8" r="6" fill="{}"/>',
    "automobile": '<path fill="{}" d="M1 5h14v6h-14z"/>',
    "dog": '<path fill="{}" d="M5 1h6v14h-6z"/>',
    "fox-face": '<path fill="{}" d="M8 2L14 14H2z"/>',
    "banana": '<path fill="{}" d="M2 2L14 2L8 14z"/>',
    "guitar": '<path fill="{}" d="M6 2h4v4h4v4h-4v4h-4v-4H2V6h4z"/>',
    "red-apple": '<circle cx="8" cy="8" r="5" fill="#e02020"/>',
    "green-apple": '<circle cx="8" cy="8" r="5" fill="#20b030"/>',
    "elephant": '<path fill="#999999" d="M2 4h12v8h-12z"/>',
    "woman-artist": '<path fill="#404040" d="M2 2h12v12h-12z"/>',
    "woman-artist-dark-skin-tone": '<path fill="#404040" d="M2 2h12v12h-12z"/>',
}
FILLS = ("#e02020", "#f5c518", "#2060e0", "#8b46c9", "#20a030")


def write_package(folder: Path) -> Path:
    """The files of npm's @iconify/json that are read."""
    (folder / "json").mkdir(parents=True)
    for number, icon_set in enumerate(STYLES):
        icons = {
            name: {"body": body.format(FILLS[(number + place) % len(FILLS)])}
            for place, (name, body) in enumerate(SHAPES.items())
        }
        content = {"prefix": icon_set, "icons": icons, "width": 16, "height": 16}
        (folder / "json" / f"{icon_set}.json").write_text(json.dumps(content))
    about = {"author": {"name": "A"}, "license": {"title": "MIT", "url": "https://l"}}
    (folder / "collections.json").write_text(json.dumps({name: {"name": name} | about for name in STYLES}))
    (folder / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    return folder


def make_sprites(folder: Path, size: int = 48) -> Path:
    """Sprites of that package."""
    package = write_package(folder / "package")
    write_sprites(package, folder / "sprites", size=size, fraction=0.1, seed=0, workers=1)
    return folder / "sprites"
