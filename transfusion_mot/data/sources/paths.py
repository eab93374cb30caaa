"""Checks that the files of data sources exist, without loading PyTorch or `datasets`, so that they are fast."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transfusion_mot.config import SourceConfig
from transfusion_mot.data.sprites import Sprites
from transfusion_mot.errors import UserError
from transfusion_mot.hub_names import refuse_missing_path

# Range in a pattern of paths: "{00000..00012}".
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HINT = (
    "give a path relative to the working directory (the first lines of each file in configs/ say how to make its data)"
)


def refuse_missing_sources(sources: Sequence[SourceConfig]) -> None:
    """Refuse sources whose files are missing, and sources that are given twice.

    Raises:
        UserError: It names the first one.
    """
    for source in sources:
        refuse_missing_source(source)
    seen: list[SourceConfig] = []
    for source in sources:
        same = replace(source, weight=1.0, path=source.path and os.path.normpath(source.path))
        if same in seen:
            raise UserError(
                f"data.sources[{seen.index(same)}] and data.sources[{len(seen)}] are the same {source.kind} source "
                f"'{source.path}'; give it once, with the sum of the weights"
            )
        seen.append(same)


def refuse_missing_source(source: SourceConfig) -> None:
    """Refuse a source whose files are missing.

    Raises:
        UserError: It names the source.
    """
    if source.kind == "openmoji":
        return
    if not source.path:
        raise UserError(f"a source of kind '{source.kind}' needs 'path'")
    if source.kind == "datasets":
        refuse_missing_path(source.path, "datasets source")
    elif source.kind == "scenes":
        Sprites(source.path)
    elif source.kind in ("imagefolder", "audiofolder", "coco"):
        if not Path(source.path).is_dir():
            raise UserError(f"{source.kind} source '{source.path}' is not a folder; {_HINT}")
    else:
        refuse_missing_files(source.path, source.kind)
    if source.kind == "coco" and source.annotations is not None and not Path(source.annotations).is_file():
        raise UserError(
            f"the annotations of coco source '{source.path}' are missing: '{source.annotations}' is not a file"
        )


def refuse_missing_files(path: str, kind: str) -> None:
    """Refuse a path of a source that is not a file, folder or pattern of files.

    Raises:
        UserError: It gives the path.
    """
    if not Path(path).exists() and "*" not in path and not NUMBERS.search(path):
        raise UserError(f"{kind} source '{path}' is not a file or folder; {_HINT}")
