"""Rows of .jsonl, .csv and .parquet files with their places, and checks of their fields."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfusion_mot.data.sources.base import SkippedItems, Split, counted
from transfusion_mot.data.sources.columns import MediaColumns
from transfusion_mot.data.sources.paths import NUMBERS, refuse_missing_files
from transfusion_mot.errors import UserError

Row = dict[str, Any]

# Rows of a table that are read at a time.
ROWS_AT_ONCE = 1024
_UNUSABLE = "unusable row"
# This many unusable items without a usable one are not an accident.
_MOST_UNUSABLE = 1000
_TRAIN_NAMES = ("train", "training")
_HELD_OUT_NAMES = ("held_out", "val", "valid", "validation", "dev", "test")


def find_files(path: str, suffixes: Sequence[str], kind: str) -> list[Path]:
    """The sorted files of a source's path: one file, all files in a folder and its subfolders, or all that match a
    pattern with `*` or with numbers, such as `{00000..00012}.tar`.

    Raises:
        UserError: There are none, or they are of another kind; gives what was found.
    """
    refuse_missing_files(path, kind)
    given = Path(path)
    wanted = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
    if given.is_file():
        found = [given]
    elif given.is_dir():
        found = [file for file in given.rglob("*") if file.is_file()]
        if not any(suffix_of(file) in suffixes for file in found):
            instead = f"it has other files, such as '{found[0].name}'" if found else "it is empty"
            raise UserError(
                f"{kind} source '{path}' is a folder without any {wanted} file: {_compressed(found) or instead}"
            )
        found = [file for file in found if suffix_of(file) in suffixes]
    elif numbers := NUMBERS.search(path):
        first, last = numbers.groups()
        names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        parts = [path[: numbers.start()] + name + path[numbers.end() :] for name in names]
        found = [file for part in parts for file in find_files(part, suffixes, kind)]
    else:
        root = Path(given.anchor)
        found = list(root.glob(str(given.relative_to(root))))
    if not found:
        raise UserError(f"{kind} source '{path}': no file matches the pattern")
    if others := [file for file in found if suffix_of(file) not in suffixes]:
        reason = _compressed(others) or f"'{others[0]}' is none"
        raise UserError(f"{kind} source '{path}' must be a {wanted} file, or a folder that holds some; {reason}")
    return sorted(found)


def suffix_of(file: Path) -> str:
    """The suffix of a file name in lower case: "A.TAR" => ".tar"."""
    return file.suffix.lower()


def _compressed(files: Sequence[Path]) -> str:
    """A message about compressed tar files, if there are any."""
    named = next((file.name for file in files if re.search(r"(?i)\.(tgz|tar\.\w+)$", file.name)), None)
    return f"'{named}' is compressed and cannot be read in any order; uncompress it" if named is not None else ""


class Unusable:
    """Unusable items of a large set: counted and listed if other items can be used, refused if none can.

    Attributes:
        num_used: Number of usable items so far.
    """

    def __init__(self, skipped: SkippedItems) -> None:
        self.num_used = 0
        self._skipped = skipped
        self._num_unusable = 0
        self._first: UserError | None = None

    def add(self, error: UserError, reason: str = _UNUSABLE) -> None:
        """Count an unusable item, by its reason.

        Raises:
            UserError: The problem of the first item, if very many items were unusable and none usable.
        """
        self._first = self._first or error
        self._num_unusable += 1
        self._skipped.add(reason, str(error))
        if self._num_unusable >= _MOST_UNUSABLE:
            self.refuse_if_all()

    def refuse_if_all(self) -> None:
        """Called at the end.

        Raises:
            UserError: The problem of the first item, if no item could be used.
        """
        if self._first is not None and not self.num_used:
            raise self._first


def rows_of(
    file: Path, columns: Sequence[str] | None = None, unusable: Unusable | None = None
) -> Iterator[tuple[str, Row]]:
    """Rows of a .jsonl, .csv or .parquet file with their places ("file:line"); of parquet only `columns`, if given.

    Args:
        unusable: Counts lines of a .jsonl file that are not JSON objects; None refuses them.

    Raises:
        UserError: The file is damaged or not UTF-8; gives the place.
    """
    if suffix_of(file) == ".parquet":
        with open_parquet(file) as table:
            number = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    elif suffix_of(file) == ".csv":
        yield from _csv_rows(file)
    else:
        skip = None if unusable is None else unusable.add
        for number, line in lines_of(file, skip=skip):
            if not line:
                continue
            where = f"{file}:{number}"
            try:
                row = json_object(line, where)
            except UserError as error:
                if skip is None:
                    raise
                skip(error)
            else:
                yield where, row


def _csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a .csv file; the place is the line where a row begins.

    Raises:
        UserError: A row has another number of fields than the header, or a quote is not closed.
    """
    reader = csv.reader((line for _, line in lines_of(file, keep_ends=True)), strict=True)
    header: list[str] | None = None
    hint = 'a text that holds a comma, a line break or a double quote must be in double quotes, as "a cat, a dog"'
    where = f"{file}:1"
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                if header is None:
                    header = fields
                elif len(fields) != len(header):
                    found = counted({"field": len(fields)})
                    raise UserError(f"{where}: has {found} where the header has {len(header)}; {hint}")
                else:
                    yield where, dict(zip(header, fields, strict=True))
            where = f"{file}:{reader.line_num + 1}"
    except csv.Error as error:
        raise UserError(f"{where}: the row that begins there is not CSV ({error}); {hint}") from None


def open_parquet(file: Path) -> pq.ParquetFile:
    """A memory-mapped parquet file.

    Raises:
        UserError: The file is damaged or empty.
    """
    try:
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"'{file}' is not a whole parquet file ({str(error).splitlines()[0]})") from None


def json_object(text: str, where: str) -> Row:
    """Parse a JSON object.

    Raises:
        UserError: The text is not a JSON object.
    """
    entry = from_json(text, f"{where}: not JSON")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a JSON object, got {type(entry).__name__}")
    return entry


def from_json(content: str | bytes, problem: str) -> Any:
    """Parse JSON.

    Raises:
        UserError: `content` is not valid JSON; the message is `problem` and the reason.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"{problem} (nested too deeply)") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise UserError(f"{problem} ({error})") from None


def lines_of(
    file: Path, keep_ends: bool = False, skip: Callable[[UserError], None] | None = None
) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file, numbered from 1, by default without white space at both ends.

    Args:
        skip: Called with the problem of a line that is not UTF-8; None refuses it.

    Raises:
        UserError: The file is not UTF-8.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                # "utf-8-sig": some editors put a byte-order mark before the first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                refusal = UserError(f"{file}:{number}: not UTF-8 text ({error.reason}); convert the file to UTF-8")
                if skip is None:
                    raise refusal from None
                skip(refusal)
                continue
            yield number, text if keep_ends else text.rstrip()


def pick_column(wanted: str | None, usual: Sequence[str], columns: Sequence[str], where: str) -> str:
    """The wanted column, or the first existing one of the usual columns.

    Raises:
        UserError: There is none; lists the existing ones.
    """
    for name in [wanted] if wanted is not None else usual:
        if name in columns:
            return name
    asked = repr(wanted) if wanted is not None else " or ".join(map(repr, usual))
    raise UserError(f"{where}: needs a field {asked}; it has {sorted(columns)}")


def pick_text_column(wanted: str | None, media: MediaColumns, columns: Sequence[str], where: str) -> str | None:
    """Like `pick_column`, for texts; None if there is no column and texts are optional, as for audio."""
    if wanted is None and media.medium == "audio" and not set(media.usual_texts) & set(columns):
        return None
    return pick_column(wanted, media.usual_texts, columns, where)


def texts_in(value: Any, name: str, where: str) -> list[str]:
    """Stripped texts in a field (a text, a list of texts, or null), without empty ones.

    Raises:
        UserError: The field holds something else.
    """
    values = value if isinstance(value, list) else [value]
    for text in values:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: the field '{name}' must be a text or a list of texts, got {value!r:.100}")
    # JSON can contain half of a surrogate pair, which UTF-8 cannot encode.
    texts = (text.encode("utf-8", errors="replace").decode("utf-8").strip() for text in values if text)
    return [text for text in texts if text]


def split_field(row: Row, where: str) -> Split | None:
    """The side in a row's field `split`, if it has one.

    Raises:
        UserError: The field does not name a side.
    """
    value = row.get("split")
    if value is None or value in _TRAIN_NAMES:
        return None if value is None else "train"
    if value in _HELD_OUT_NAMES:
        return "held_out"
    raise UserError(f"{where}: the field 'split' is {value!r}; it must be one of {(*_TRAIN_NAMES, *_HELD_OUT_NAMES)}")
