"""Hashes that identify the weights of a measurement."""

import hashlib
from pathlib import Path

import torch
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
    """Hash of a model's parameters and buffers on the CPU, independent of their files."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        # Hashed as bytes, because numpy has no bfloat16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256 {digest.hexdigest()[:12]}"
