"""`LoRALinear` (Hu et al. 2021), and its injection into a module tree.

The base layer is any module with `in_features` and `out_features`. The base's output and the LoRA update are added
before rounding to bf16. An update is often smaller than half a unit in the last place of the base's output, and would
be lost otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from adapters import memory, peft_config
from adapters.errors import AdapterError, BaseMismatch
from adapters.weights import LoraWeights, LowRank, with_digest

TRAINED_BYTES = 24
"""Bytes per parameter in float32: value, gradient, two moments, best value so far, and a temporary copy."""


@dataclass(frozen=True)
class LoraSpec:
    """Which linears get a LoRA, and of which rank.

    Attributes:
        targets: names (suffixes of module paths), a regular expression for whole paths, or "all-linear".
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        rank_of: ranks of single module paths; 0 excludes a module.

    Raises:
        AdapterError: rank, alpha or dropout is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = peft_config.ALL_LINEAR
    rslora: bool = False
    rank_of: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"a rank must be at least 1, not {self.rank}", "lora_rank")
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"dropout is from 0 to under 1, not {self.dropout!r}", "lora_dropout")
        if not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise AdapterError(f"alpha must be finite and over 0, not {self.alpha!r}", "lora_alpha")

    def ranks(self, names: Iterable[str]) -> dict[str, int]:
        """Module path -> rank, for those of the base's linears (`names`) that get a LoRA.

        Raises:
            BaseMismatch: no linear matches, a name of `targets` matches none, or `rank_of` names a path that is no
                target.
            InvalidAdapter: `targets` is not a valid regular expression.
            UnsupportedAdapter: a target cannot have a LoRA.
        """
        targets = self.targets if isinstance(self.targets, str) else frozenset(self.targets)
        config = peft_config.LoraConfig(self.rank, self.alpha, self.rslora, (), (), targets, frozenset(), None, ())
        known = list(names)
        chosen = {name: self.rank_of.get(name, self.rank) for name in peft_config.select(config, known)}
        result = {name: rank for name, rank in chosen.items() if rank > 0}
        listed = () if isinstance(self.targets, str) else self.targets
        odd = [name for name in listed if not any(f".{path}".endswith(f".{name}") for path in known)]
        if odd or not result:
            targets_shown = ", ".join(odd or listed) or self.targets
            available = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise BaseMismatch(
                f"target_modules = {targets_shown} matches no linear of the base; its linears are {available}",
                "target_modules",
            )
        for path, rank in self.rank_of.items():
            if path not in chosen:
                why = "is not in target_modules" if path in known else "is no linear of the base"
                raise BaseMismatch(f"lora_rank_of sets rank {rank} for {path!r}, which {why}", "lora_rank_of")
        return result


@runtime_checkable
class Onto(Protocol):
    """A base layer that adds a LoRA update to its output before rounding to x's dtype."""

    def onto(self, update: torch.Tensor, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """`update` [..., out] plus the layer's output for x [..., in]."""


class LoRALinear(nn.Module):
    """`base_layer(x) + scale * B (A dropout(x))`. A is [rank, in], B is [out, rank], float32; the base is frozen.

    A is initialized from a normal distribution with the variance of PEFT's uniform one, 1 / (3 in), and B with zeros.
    GEMMs run in x's dtype. Raises AdapterError as `LoraSpec` does.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        LoraSpec(rank, alpha, dropout)  # validates them
        width: int = base_layer.in_features  # type: ignore[assignment]
        out: int = base_layer.out_features  # type: ignore[assignment]
        self.base_layer = base_layer
        self.rank = rank
        self.scale = peft_config.scale_of(alpha, rank, rslora)
        self.dropout = dropout
        drawn = torch.empty(rank, width, device="cpu").normal_(0.0, (3.0 * width) ** -0.5, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(torch.get_default_device()))
        self.lora_B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        base = self.base_layer
        drops = self.dropout > 0.0 and self.training
        frozen = base if isinstance(base, nn.Linear) and not base.weight.requires_grad else None
        dense = frozen if frozen is not None and frozen.weight.dtype == x.dtype else None
        if dense is not None and not drops:
            fused: torch.Tensor = _Fused.apply(x, dense.weight, dense.bias, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
            return fused
        dropped = F.dropout(x, self.dropout) if drops else x
        update = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)) * self.scale, self.lora_B.to(x.dtype))
        if isinstance(base, Onto):
            return base.onto(update, x, *args)
        if dense is not None:
            rows, sums = x.reshape(-1, x.shape[-1]), update.view(-1, update.shape[-1])
            y = torch.addmm(sums, rows, dense.weight.T).view_as(update)
            return y if dense.bias is None else y + dense.bias
        return base(x, *args) + update  # type: ignore[no-any-return]

    def low_rank(self) -> LowRank:
        """A copy of the current factors."""
        return LowRank(self.lora_A.detach().clone(), self.lora_B.detach().clone(), self.scale)


class _Fused(torch.autograd.Function):
    """A frozen `nn.Linear` and its LoRA as one function, in forward and backward. Saves x and A x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        scaled = (b * scale).to(x.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        y = (inner @ scaled.T).addmm_(rows, weight.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inner = (grad @ b) * ctx.scale
        grad_x = (grad_inner @ a).addmm_(grad, weight) if ctx.needs_input_grad[0] else None
        grad_b = (inner.T @ grad).T * ctx.scale  # avoids transposing the wide matrix
        shape = (*grads[0].shape[:-1], weight.shape[1])
        return (grad_x.view(shape) if grad_x is not None else None), None, None, grad_inner.T @ rows, grad_b, None


def linears(tree: nn.Module) -> dict[str, nn.Module]:
    """Path -> module with `in_features` and `out_features`, without output heads."""
    return {
        path: module
        for path, module in tree.named_modules()
        if hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and path
        and not peft_config.HEADS.fullmatch(path)
        and not path.endswith(".base_layer")
    }


def injected(tree: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRALinear of a tree."""
    return {path: module for path, module in tree.named_modules() if isinstance(module, LoRALinear)}


def inject(tree: nn.Module, spec: LoraSpec, seed: int = 0) -> dict[str, LoRALinear]:
    """Wrap each targeted linear with a LoRALinear and freeze everything else.

    Raises:
        BaseMismatch: the spec matches no linear.
        AdapterError: the tree has LoRA layers already.
    """
    if injected(tree):
        raise AdapterError("the tree has LoRA layers already; eject them first")
    found = linears(tree)
    ranks = spec.ranks(found)
    tree.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, rank in ranks.items():
        layer = LoRALinear(found[path], rank, spec.alpha, spec.dropout, spec.rslora, generator)
        _set(tree, path, layer)
        layers[path] = layer
    return layers


def load(layers: Mapping[str, LoRALinear], weights: LoraWeights) -> None:
    """Set factors and scales to those of `weights`. Raises BaseMismatch if modules or shapes differ."""
    if set(layers) != set(weights.modules):
        different = sorted(set(layers) ^ set(weights.modules))
        raise BaseMismatch(
            f"the initial adapter and the targets differ in {len(different)} modules, the first is {different[0]!r}"
        )
    for path, layer in layers.items():
        a, b, scale = weights.modules[path][:3]
        if a.shape != layer.lora_A.shape or b.shape != layer.lora_B.shape:
            raise BaseMismatch(
                f"{path}: the initial adapter has {list(b.shape)} x {list(a.shape)}, "
                f"not {list(layer.lora_B.shape)} x {list(layer.lora_A.shape)}"
            )
        with torch.no_grad():
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
        layer.scale = scale


def extract(tree: nn.Module, name: str) -> LoraWeights:
    """A copy of the factors of a tree's LoRALinears, float32."""
    return with_digest(name, {path: layer.low_rank() for path, layer in injected(tree).items()})


def eject(tree: nn.Module) -> None:
    """Restore the base layers."""
    for path, layer in injected(tree).items():
        _set(tree, path, layer.base_layer)


def shapes(tree: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear."""
    return {path: (int(m.out_features), int(m.in_features)) for path, m in linears(tree).items()}  # type: ignore[arg-type]


def trainable_parameters(shapes: Mapping[str, tuple[int, int]], spec: LoraSpec) -> int:
    """The number of trainable parameters of a spec on a base with these linears (path -> (out, in))."""
    return sum(rank * sum(shapes[path]) for path, rank in spec.ranks(shapes).items())


def check_room(tree: nn.Module, spec: LoraSpec) -> None:
    """Raises AdapterError if the parameters would not fit into free memory. On a GPU the allocator does that."""
    if torch.get_default_device().type != "cpu":
        return
    count, free = trainable_parameters(shapes(tree), spec), memory.free()
    if count * TRAINED_BYTES > free:
        raise AdapterError(
            f"training {count:,} parameters needs {count * TRAINED_BYTES >> 20:,} MiB and {free >> 20:,} MiB are free; "
            "lower lora_rank, or choose fewer target_modules",
            "lora_rank",
        )


def _set(tree: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(tree.get_submodule(parent), last, module)
