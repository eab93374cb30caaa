"""Human speech with transcripts: the prompts of the telephone system Asterisk, from two Debian packages.

`asterisk-core-sounds-en` has the texts, `asterisk-core-sounds-en-wav` the recordings: 8,000 samples a second.
"""

import gzip
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from transfusion_mot.data.audio import Audio, UnreadableAudio, decode_audio
from transfusion_mot.errors import UserError

LICENCE = (
    "Asterisk core sounds, spoken by Allison Smith (theivrvoice.com), financed by Digium, Inc.; CC BY-SA 3.0 "
    "(creativecommons.org/licenses/by-sa/3.0)"
)
_TEXTS, _SOUNDS = "core-sounds-en.txt.gz", ".wav"
_PACKAGES = "asterisk-core-sounds-en and asterisk-core-sounds-en-wav"
# Pattern of a voice's folder, such as "en_US_f_Allison".
_VOICE_FOLDER = "/sounds/en"
# Tones in brackets, digits and telephone keys are not words.
_NO_WORDS = re.compile(r"[\[\]<>()\d*#_/]")


class Prompt(NamedTuple):
    """A recording of a human.

    Attributes:
        name: For example "vm-goodbye", or "digits/thousand".
        text: The spoken text.
        audio: The recording.
    """

    name: str
    text: str
    audio: Audio


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """The prompts that consist of two words or more.

    Args:
        paths: Debian packages, or folders with their unpacked content.

    Raises:
        UserError: They have no texts or no recordings.
    """
    texts: dict[str, str] = {}
    sounds: dict[str, bytes] = {}
    for path in paths:
        for name, content in _folder_files(path) if path.is_dir() else _package_files(path):
            if name.endswith(_TEXTS):
                texts = _parse_texts(gzip.decompress(content).decode())
            elif _VOICE_FOLDER in name:
                sounds[name.partition(_VOICE_FOLDER)[2].partition("/")[2].removesuffix(_SOUNDS)] = content
    if not texts or not sounds:
        shown = ", ".join(f"'{path}'" for path in paths)
        raise UserError(
            f"{shown}: no {'recordings' if texts else 'texts'} of Asterisk; give the packages {_PACKAGES} "
            "from `apt-get download`, or a folder with their unpacked content"
        )
    prompts = []
    for name, text in sorted(texts.items()):
        if name in sounds and len(text.split()) >= 2:
            try:
                prompts.append(Prompt(name, text, decode_audio(sounds[name], name)))
            except UnreadableAudio:  # an empty prompt
                continue
    return prompts


def _parse_texts(content: str) -> dict[str, str]:
    """Lines "name: text" => those that consist only of words."""
    lines = (line.partition(": ") for line in content.splitlines() if not line.startswith(";"))
    texts = {name.strip(): " ".join(text.replace("...", " ").split()) for name, _, text in lines}
    return {name: text for name, text in texts.items() if text and not _NO_WORDS.search(text)}


def _is_needed(name: str) -> bool:
    return name.endswith(_TEXTS) or (name.endswith(_SOUNDS) and _VOICE_FOLDER in name)


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if _is_needed(path.as_posix()) and path.is_file():
            yield path.as_posix(), path.read_bytes()


def _package_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Files of a Debian package (deb(5)): an archive of ar(5) whose member `data.tar.*` holds them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}; give the packages {_PACKAGES}") from None
    refusal = UserError(f"'{path}' is not a Debian package; give the packages {_PACKAGES}")
    if not content.startswith(b"!<arch>\n"):
        raise refusal
    start = 8
    while start + 60 <= len(content):
        # A header has 60 bytes: name in the first 16, ..., size at 48. Members begin at even offsets.
        name, size = content[start : start + 16].decode("ascii", "replace").strip(" /"), content[start + 48 :][:10]
        data = content[start + 60 : start + 60 + int(size)]
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                    for member in tar:
                        file = tar.extractfile(member) if member.isfile() and _is_needed(member.name) else None
                        if file is not None:
                            yield PurePosixPath(member.name).as_posix(), file.read()
            except (tarfile.TarError, EOFError, OSError):
                raise UserError(
                    f"'{path}' cannot be unpacked; unpack it by `dpkg -x {path} FOLDER` and give the folder"
                ) from None
            return
        start += 60 + len(data) + len(data) % 2
    raise refusal
