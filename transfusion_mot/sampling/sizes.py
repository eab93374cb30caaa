"""Image sizes of a model: the size at which a picture is read, and those that can be painted."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
from PIL import Image

from transfusion_mot.codecs.base import check_image_size
from transfusion_mot.data.images import ImageArray, ImageFit, displayed_size, load_image, nearest_buckets
from transfusion_mot.errors import UserError

# (height, width) in pixels.
Size = tuple[int, int]
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class ImageSizes:
    """Sizes of images, all of one model.

    Args:
        multiple: Side of a patch in pixels; heights and widths are multiples of it.
        trained: Sizes that the model was trained on.
        fit: How pictures of other proportions are fitted, as in `load_image`.

    Raises:
        UserError: A side is not a multiple, or the fit is unknown.
    """

    def __init__(self, multiple: int, trained: Sequence[Sequence[int]], fit: ImageFit) -> None:
        if fit not in get_args(ImageFit):
            raise UserError(f"image_fit is '{fit}'; known: {', '.join(get_args(ImageFit))}")
        for side in (side for size in trained for side in size):
            check_image_size(side, multiple)
        self.trained: list[Size] = [(height, width) for height, width in trained]
        self.fit = fit
        self.multiple = multiple
        self._warned_of: set[Size] = set()

    @property
    def default(self) -> Size:
        """The default size of painting: the trained size closest to a square; of several the first."""
        return self._nearest((1, 1))

    def of(self, picture: str | Path | bytes | Image.Image, name: str | None = None) -> Size:
        """The size at which training would read a picture.

        Raises:
            UserError: As `displayed_size`.
        """
        return self.trained[0] if len(self.trained) == 1 else self._nearest(displayed_size(picture, name))

    def read(self, picture: str | Path | bytes | Image.Image, size: Size | None = None) -> ImageArray:
        """A picture as training would read it, `uint8 [H, W, 3]`, at its own size or at a given one.

        Raises:
            UserError: As `load_image`.
        """
        return load_image(picture, size or self.of(picture), self.fit)

    def painted(self, height: int | None, width: int | None, pictures: Sequence[Image.Image] = ()) -> Size:
        """The size of images to paint.

        Any size of whole patches can be painted, as in the pipelines of diffusers. An untrained size gives a warning,
        once.

        Args:
            height: In pixels; None is the height of the pictures, or the default.
            width: As `height`.
            pictures: Pictures that are varied or edited.

        Raises:
            UserError: A side is not a multiple of a patch's, or the pictures are read at different sizes.
        """
        if height is None or width is None:
            found = {self.of(picture) for picture in pictures} or {self.default}
            if len(found) > 1:
                shown = "; ".join(f"height {size[0]}, width {size[1]}" for size in sorted(found))
                raise UserError(
                    f"the pictures have different proportions, so the model reads them at different sizes ({shown}); "
                    "give height and width, or use one call for each"
                )
            ((own_height, own_width),) = found
            height = own_height if height is None else height
            width = own_width if width is None else width
        check_image_size(height, self.multiple, "height")
        check_image_size(width, self.multiple, "width")
        size = (height, width)
        if size not in self.trained and size not in self._warned_of:
            self._warned_of.add(size)
            shown = ", ".join(f"{height} x {width}" for height, width in self.trained)
            _logger.warning(
                "the model was trained on images of %s pixels (height x width) and paints %d x %d, which may be worse",
                shown,
                *size,
            )
        return size

    def _nearest(self, size: Size) -> Size:
        return self.trained[int(nearest_buckets(np.array([size]), self.trained)[0])]


def by_size(sizes: Sequence[Size], make: Callable[[list[int], Size], Sequence[Result]]) -> list[Result]:
    """Make results for items of different sizes, batched by size => the results in order.

    Args:
        sizes: Size of each item.
        make: (Indices of all items of one size, that size) => a result for each.
    """
    places: dict[Size, list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    results: dict[int, Result] = {}
    for size, same in places.items():
        results.update(zip(same, make(same, size), strict=True))
    return [results[place] for place in range(len(sizes))]
