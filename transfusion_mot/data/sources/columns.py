"""Media of a source's items and their columns, from the source's configuration."""

from dataclasses import dataclass

from transfusion_mot.config import SourceConfig
from transfusion_mot.data.audio import UnreadableAudio
from transfusion_mot.data.images import UnreadableImage
from transfusion_mot.data.sources.base import NOUNS, Medium
from transfusion_mot.errors import UnreadableMedia, UserError


@dataclass(frozen=True)
class MediaColumns:
    """Columns, fields or extensions of the media of an item.

    Attributes:
        medium: Medium of the first media.
        first: Column of the first media; None means a usual name.
        second: Column of the second media: the source image of an edit, or the audio of an image; None if there is
            only one.
        is_edit: Whether an item is an editing pair.
    """

    medium: Medium = "image"
    first: str | None = None
    second: str | None = None
    is_edit: bool = False

    @property
    def has_audio(self) -> bool:
        """Whether an item has audio."""
        return self.medium == "audio" or (self.second is not None and not self.is_edit)

    @property
    def prefix(self) -> str:
        """Prefix of the array names of the second media."""
        return "source_" if self.is_edit else "audio_"

    @property
    def second_medium(self) -> Medium:
        """The second media."""
        return "image" if self.is_edit else "audio"

    @property
    def second_noun(self) -> str:
        """Name of one of the second media, for messages."""
        return NOUNS[self.second_medium]

    @property
    def noun(self) -> str:
        """Name of one of the first media, for messages."""
        return NOUNS[self.medium]

    @property
    def usual_texts(self) -> tuple[str, str]:
        """Usual names of the text column, if none is given."""
        return ("transcription", "text") if self.medium == "audio" else ("text", "caption")

    @property
    def key(self) -> list[str | bool | None]:
        """Part of the key of an index."""
        return [self.medium, self.first, self.second, self.is_edit]


IMAGES_ALONE = MediaColumns()
UNREADABLE: dict[Medium, type[UnreadableMedia]] = {"image": UnreadableImage, "audio": UnreadableAudio}


def media_columns(source: SourceConfig) -> MediaColumns:
    """The media columns of a source.

    Raises:
        UserError: It asks for both editing pairs and audio.
    """
    if source.source_image_column is not None and source.audio_column is not None:
        raise UserError(
            f"source '{source.path}' has both source_image_column and audio_column, but editing pairs have no audio; "
            "remove one"
        )
    if source.kind == "audiofolder":
        return MediaColumns("audio", source.audio_column)
    if source.audio_column is not None and source.image_column is None and source.kind != "imagefolder":
        return MediaColumns("audio", source.audio_column)
    is_edit = source.source_image_column is not None
    return MediaColumns(
        "image", source.image_column, source.source_image_column if is_edit else source.audio_column, is_edit
    )
