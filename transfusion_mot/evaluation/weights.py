"""Hashes that say which weights a number was measured with."""

import hashlib
from pathlib import Path

from torch import nn

from transfusion_mot.errors import UserError


def file_sha256(path: Path) -> str:
    """Hash of a file's content.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights '{path}': {error.strerror}") from None


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers on the CPU, whatever files they came from."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:12]}"
