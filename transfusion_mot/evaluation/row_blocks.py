"""Blocks of rows of matrices that do not fit in memory."""

from collections.abc import Iterator

# Elements of a block: half a gigabyte in float64.
_ELEMENTS = 2**26


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices that cover `num_rows`, each of about 2^26 elements of a matrix of `num_columns`."""
    step = max(1, _ELEMENTS // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
