"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of the blocks, through peft.

The matrix of queries, keys and values stacks three maps. Each of them has its own adapter, as in a model with three
matrices.

Shapes: R rank, I and O columns and rows of a matrix, n adapted maps of a matrix.
"""

import hashlib
from collections.abc import Hashable, Iterator
from typing import Any, cast

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transfusion_mot.config import LoraConfig
from transfusion_mot.models.layers import QKVProjection, SwiGLU
from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT, base_name, is_of_adapter

# Name of the adapter that is trained.
TRAINED = "default"
# Elements of a tensor that a fingerprint reads.
_LOOKED_AT = 1024


class StackedUp(nn.Module):
    """The stacked matrices B of the adapted maps: [their rows, R].

    Args:
        rank: R.
        parts: Every map of the layer with its number of rows.
        adapted: The adapted maps.
    """

    def __init__(self, rank: int, parts: dict[str, int], adapted: list[str], **like: Any) -> None:
        super().__init__()
        self.parts, self.adapted = parts, adapted
        self.rows = [parts[part] for part in adapted]
        self.weight = nn.Parameter(torch.empty(sum(self.rows), rank, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, so that a new adapter changes nothing."""
        nn.init.zeros_(self.weight)

    def forward(self, down: Tensor, result: Tensor, scale: float) -> Tensor:
        """Add scale * B * (outputs of the matrices A, [..., n * R]) to the output of the layer, [..., O]."""
        pieces = dict(zip(self.parts, result.flatten(0, -2).split(list(self.parts.values()), dim=1), strict=True))
        downs = down.flatten(0, -2).chunk(len(self.adapted), dim=1)
        for part, own, weight in zip(self.adapted, downs, self.weight.split(self.rows), strict=True):
            # An operation that selective checkpointing computes again, for it costs little: `addmm` would be kept
            # beside the product that it adds to.
            pieces[part] = torch.baddbmm(pieces[part][None], own[None], weight.T[None], alpha=scale)[0]
        return _joined(list(pieces.values()), dim=1).view(result.shape)

    def whole(self, down: Tensor) -> Tensor:
        """B A, with zeros for maps without an adapter: A [n * R, I] => [O, I]."""
        # Half precision is slow on CPUs.
        wide = torch.promote_types(down.dtype, torch.float32)
        found = zip(self.weight.to(wide).split(self.rows), down.to(wide).chunk(len(self.rows)), strict=True)
        products = dict(zip(self.adapted, (up @ part for up, part in found), strict=True))
        zero = down.new_zeros(1, down.shape[1], dtype=wide)
        return torch.cat([products.get(part, zero.expand(rows, -1)) for part, rows in self.parts.items()])


class LoraLinear(PeftLinear):
    """A linear layer of stacked maps with adapters; peft's own layer supports only one map.

    Args:
        base_layer: The linear layer.
        adapter_name: Name of its first adapter.
        parts: Name of each stacked map => its number of rows.
        adapted: Name of an adapter => the maps that it changes.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str,
        *,
        parts: dict[str, int],
        adapted: dict[str, list[str]],
        **kwargs: Any,
    ) -> None:
        # The constructor of peft calls `update_layer`.
        self.parts, self.adapted = parts, adapted
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, *_: Any, **__: Any) -> None:
        """Add an adapter in the number format of the matrix; B is zero, so it changes nothing yet."""
        matrix, adapted = cast(nn.Linear, self.get_base_layer()), self.adapted[adapter_name]
        like: dict[str, Any] = {"device": matrix.weight.device, "dtype": matrix.weight.dtype}
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, lora_alpha / r
        # Nothing is drawn inside of a block, see `MoTBlock.forward`.
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(matrix.in_features, r * len(adapted), bias=False, **like)
        self.lora_B[adapter_name] = StackedUp(r, self.parts, adapted, **like)
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the matrix [O, I] by an adapter."""
        down = cast(nn.Linear, self.lora_A[adapter]).weight
        return (cast(StackedUp, self.lora_B[adapter]).whole(down) * self.scaling[adapter]).to(down.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                result = self.lora_B[name](self.lora_A[name](x), result, self.scaling[name])
        return result


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _matrices(model: TransfusionMoT) -> Iterator[tuple[str, str, nn.Linear | LoraLinear, dict[str, int]]]:
    """Tower, name, module, and maps with their rows, of every matrix of the blocks."""
    for number, block in enumerate(cast(list[MoTBlock], list(model.blocks))):
        for component in ("qkv", "output", "ffn"):
            for tower, module in cast(nn.ModuleDict, getattr(block, component).owned).items():
                name = f"blocks.{number}.{component}.owned.{tower}"
                if isinstance(module, QKVProjection):
                    rows = [heads * module.head_dim for heads in module.heads]
                    yield tower, f"{name}.linear", cast(Any, module.linear), dict(zip("qkv", rows, strict=True))
                elif isinstance(module, SwiGLU):
                    for key in ("gate", "up", "down"):
                        matrix = getattr(module, key)
                        yield tower, f"{name}.{key}", matrix, {key: matrix.out_features}
                else:
                    matrix = cast(Any, module)
                    yield tower, name, matrix, {component: matrix.out_features}


def add_adapter(model: TransfusionMoT, lora: LoraConfig, name: str = TRAINED) -> None:
    """Add an adapter that changes nothing yet to a model. All other parameters then need no gradient."""
    targets = []
    shapes: dict[nn.Module, tuple[dict[str, int], dict[str, list[str]]]] = {}
    for tower, target, matrix, parts in _matrices(model):
        adapted = [part for part in parts if part in lora.modules]
        if not adapted or tower not in (lora.towers or [tower]):
            continue
        targets.append(target)
        if isinstance(matrix, LoraLinear):
            matrix.adapted[name] = adapted
        else:
            shapes[matrix] = parts, {name: adapted}

    def build(target: nn.Linear, adapter_name: str, **kwargs: Any) -> LoraLinear:
        parts, adapted = shapes[target]
        return LoraLinear(target, adapter_name, parts=parts, adapted=adapted, **kwargs)

    config = peft.LoraConfig(r=lora.rank, lora_alpha=cast(Any, lora.alpha), target_modules=targets)
    # peft's way to layers of one's own.
    config._register_custom_module({nn.Linear: cast(Any, build)})
    peft.inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the base model, by their names without adapters."""
    return {base_name(name): value for name, value in model.named_parameters() if not is_of_adapter(name)}


def file_name(name: str, adapter: str = TRAINED) -> str:
    """Name in the adapter's files of a parameter of an adapter or of a model with one."""
    return base_name(name).replace(f".{adapter}.", ".") if is_of_adapter(name) else base_name(name)


def adapter_state(model: TransfusionMoT) -> Hashable:
    """Active adapters of a model and their scales: the state besides weights that decides their effect."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return ()
    return tuple(
        (*module.active_adapters, *module.merged_adapters, module.disable_adapters, *module.scaling.values())
        for module in model.modules()
        if isinstance(module, LoraLinear)
    )


@torch.no_grad()
def digests(model: TransfusionMoT) -> dict[str, str]:
    """Digest of each base tensor in bfloat16, which is the same for weights stored in bfloat16 or float32.

    It reads a thousand elements of each. Called by all processes if weights are sharded.
    """
    found = {}
    for name, parameter in base_parameters(model).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        some = whole.detach().flatten()[:: max(1, whole.numel() // _LOOKED_AT)]
        digest = hashlib.sha256(str(list(whole.shape)).encode())
        digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def fingerprint(of_tensors: dict[str, str], without: set[str]) -> str:
    """Fingerprint of a base model from the digests of its tensors, except those that the adapter replaces."""
    lines = [f"{name} {digest}" for name, digest in sorted(of_tensors.items()) if name not in without]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
