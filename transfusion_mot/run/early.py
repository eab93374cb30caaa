"""Checks of a run's configuration that are made at once: nothing here loads PyTorch, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfusion_mot.config import CodecConfig, RunConfig, is_saved_config, parse_config, parse_sections
from transfusion_mot.data.sources.paths import refuse_missing_sources
from transfusion_mot.errors import UserError
from transfusion_mot.files import RUN_CONFIG, step_folders
from transfusion_mot.hub_names import refuse_missing_path
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.training.tower_settings import check_lora, check_towers


def checked_sections(arguments: Sequence[str]) -> dict[str, Any]:
    """The sections of a run's configuration, without those of its initial weights; see `parse_sections`.

    Raises:
        UserError: There is a mistake in them, or a source, start, tokenizer or codec that they name is not there.
    """
    sections = parse_sections(RunConfig, arguments, "")
    refuse_missing_sources(sections["data"].sources)
    # A run that is continued has its own weights and tokenizer.
    is_new = sections["resume"] in ("auto", "never") and not step_folders(Path(sections["output_dir"]) / "state")
    towers = [tower.pretrained for tower in sections["model"].towers.values() if tower.pretrained]
    if is_new:
        file = Path(sections["output_dir"]) / RUN_CONFIG
        if file.exists() and not is_saved_config(file):
            raise UserError(
                f"{file} was written by hand, and the run would overwrite it with its whole configuration; move the "
                "file, or choose another output_dir"
            )
        if sections["init_from"] is not None:
            refuse_missing_path(sections["init_from"], "init_from")
        for name in towers:
            refuse_missing_path(name, "pretrained")
        if sections["tokenizer"].path is not None:
            refuse_missing_path(sections["tokenizer"].path, "tokenizer path")
    has_start = not is_new or sections["init_from"] is not None or bool(towers)
    for codec in sections["codecs"].values():
        # In place of the default, a start has a codec of its own.
        if not has_start or codec.path != CodecConfig.path:
            refuse_missing_path(codec.path, "codec path")
    if not has_start:
        # A start would give sections, too.
        config = parse_config(RunConfig, arguments, "")
        check_architecture(config.model)
        check_towers(config)
        check_lora(config)
    return sections
