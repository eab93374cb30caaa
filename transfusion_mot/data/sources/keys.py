"""Keys of 128 bits: hashes that identify images, computed for many at a time."""

import hashlib

import numpy as np
import numpy.typing as npt

# [N, 2], both halves of each key.
Keys = npt.NDArray[np.uint64]


def key_of(*parts: bytes) -> bytes:
    """16 bytes of hash; moving bytes from one part to the next changes it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


def keys_from(hashes: bytes) -> Keys:
    """Concatenated hashes => keys."""
    return np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2)


def places_of(wanted: Keys, among: Keys) -> npt.NDArray[np.int64]:
    """[N] index of each key in `among`, the first one if there are several; -1 if it is not there."""
    keys = np.concatenate([among, wanted])
    # A stable sort, so that among equal keys those of `among` come first.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[is_new]
    places = np.empty(len(keys), dtype=np.int64)
    places[order] = firsts[np.cumsum(is_new) - 1]
    places = places[len(among) :]
    return np.where(places < len(among), places, -1)


class KeySet:
    """Keys for single look-ups; worker processes share the memory."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys[np.argsort(keys[:, 0])]

    def __contains__(self, key: bytes) -> bool:
        first, second = np.frombuffer(key, dtype=np.uint64)
        place = int(np.searchsorted(self._keys[:, 0], first))
        while place < len(self._keys) and self._keys[place, 0] == first:
            if self._keys[place, 1] == second:
                return True
            place += 1
        return False
