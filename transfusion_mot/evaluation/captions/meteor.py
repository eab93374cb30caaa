"""METEOR 1.5 (Denkowski & Lavie 2014) as COCO's evaluation computes it, by the Java program in pycocoevalcap."""

import subprocess
from collections.abc import Sequence

from tqdm import tqdm

from transfusion_mot.evaluation.captions.java import JavaMissing, find_jar, find_java

Words = Sequence[str]


def meteor(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """METEOR of the corpus and of each image, 0 to 1, from tokenised captions in the same order.

    The corpus score is not a mean: matches and lengths are summed over all images first.

    Raises:
        JavaMissing: There is no Java, or no pycocoevalcap, or the program ends early.
    """
    java, jar = find_java(), find_jar("meteor", "meteor-1.5.jar")
    # By default the program reads numbers and captions in the locale of the machine.
    command = [java, "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US", "-Xmx2G", "-jar", str(jar)]
    with subprocess.Popen(
        [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer(line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

        def read() -> str:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                raise JavaMissing(f"METEOR's program ended early; run '{' '.join(command)}' to see why")
            return line

        statistics = []
        pairs = zip(candidates, references, strict=True)
        for words, captions in tqdm(pairs, "METEOR", len(candidates), unit="caption"):
            answer(" ||| ".join(["SCORE", *map(_joined, captions), _joined(words)]))
            statistics.append(read())
        answer(" ||| ".join(["EVAL", *statistics]))
        scores = [float(read()) for _ in candidates]
        return float(read()), scores


def _joined(words: Words) -> str:
    # Separator of captions in its input.
    return " ".join(words).replace("|||", "").replace("  ", " ")
