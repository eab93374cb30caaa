"""Captioning metrics: CIDEr, BLEU-1 to 4 and ROUGE-L of generated captions against reference captions; no Java needed.

    python evaluate/captioning.py CANDIDATES REFERENCES --output metrics.json

Both files are JSON lines (or a JSON list), one object an image, about the same images:
    candidates  {"file_name": "000.png", "caption": "a red apple"}
    references  {"file_name": "000.png", "captions": ["an apple", "a red apple on a table"]}
References may also be lines with one "text" each, several for an image, or a COCO annotation file, whose "image_id" the
candidates then use. CIDEr depends on the set of images; see docs/evaluation.md.
"""

import argparse
import logging
import sys

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.captioning import caption_metrics, match_captions, read_captions
from transfusion_mot.evaluation.report import Metric, metrics_table, save_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", metavar="CANDIDATES", help="generated captions, one an image")
    parser.add_argument("references", metavar="REFERENCES", help="reference captions, one or more an image")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON, with how they were measured")
    arguments = parser.parse_args()
    candidates, references = match_captions(read_captions(arguments.candidates), read_captions(arguments.references))
    protocol = {
        "images": len(candidates),
        "references": sum(len(captions) for captions in references),
        "tokenizer": "PTB rules of transfusion_mot",
    }
    metrics = [Metric(name, value, protocol) for name, value in caption_metrics(candidates, references).items()]
    print(metrics_table(metrics))
    if arguments.output:
        save_metrics(metrics, arguments.output, sys.argv)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main()
