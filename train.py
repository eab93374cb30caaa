"""Train a model over text and other modalities.

    python train.py --config configs/emoji_128.yaml output_dir=runs/mine training.num_steps=2000

`--help` says how to begin. `--plan` prints parameters, memory and days instead of training. `--quiet` prints only lines
of losses, warnings and errors.
"""

import logging
import os
import sys
from pathlib import Path

from transfusion_mot.cli.train_help import train_help
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.run.early import checked_sections
from transfusion_mot.training.checkpoint import find_state


def main(arguments: list[str]) -> None:
    if not arguments or "--help" in arguments or "-h" in arguments:
        topics = [word for word in arguments if word not in ("--help", "-h")]
        print(train_help(topics[0] if topics and not topics[0].startswith("-") else None))
        return
    quiet = "--quiet" in arguments
    arguments = [word for word in arguments if word != "--quiet"]
    if quiet:
        # tqdm reads it when it is imported: progress bars of reading and encoding.
        os.environ["TQDM_DISABLE"] = "1"
    # PyTorch takes seconds to load; --help, misspelt keys and missing files end before it.
    if "--plan" not in arguments:
        sections = checked_sections(arguments)
        check_writable_folder(sections["output_dir"], "output_dir")
        check_writable_folder(sections["data"].cache_dir, "data.cache_dir")
        find_state(Path(sections["output_dir"]), sections["resume"])
    from transfusion_mot.run.train import run

    run(arguments, quiet=quiet)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
