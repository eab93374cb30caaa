"""Work on many files at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from transfusion_mot.cores import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map` on all cores; results are in the order of the items. Each process receives the function once."""
    workers = min(usable_cores(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=_take, initargs=(function,)) as pool:
        yield from pool.map(_apply, items)


# The function of this process, if `map_in_processes` has started it.
_function: Callable[[Any], Any]


def _take(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _apply(item: Any) -> Any:
    return _function(item)
