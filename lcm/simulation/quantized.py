"""Stand-ins for bitsandbytes' layers, whose weights know no tensors without values.

They hold as many bytes as those, make the same temporary tensors, and keep the same ones for the backward pass.
"""

from typing import Any

import torch
from torch.nn.functional import linear

BLOCK, SCALES = 64, 256  # weights of nf4 that share a scale of 8 bits, and scales that share one of 32


class Product(torch.autograd.Function):
    """x W^T + b for packed weights.

    nf4 unpacks them for the forward pass; int8 rounds the input, and has a product in 32 bits. Both unpack them for
    the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "PackedLinear") -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        shape = (*x.shape[:-1], layer.out_features)
        if layer.precision == "int8":
            rounded = x.new_empty(x.shape, dtype=torch.int8)
            product = x.new_empty(shape, dtype=torch.int32)
            del rounded
            return product.to(ctx.dtype)
        return linear(x.to(layer.compute_dtype), layer.unpacked(), layer.bias_like(layer.compute_dtype)).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (gradient.to(ctx.layer.compute_dtype) @ ctx.layer.unpacked()).to(ctx.dtype), None


class PackedLinear(torch.nn.Linear):
    """A linear layer with a frozen weight in 8 or 4 bits, and its scales."""

    def __init__(self, layer: torch.nn.Linear, precision: str, compute_dtype: torch.dtype):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.precision, self.compute_dtype = precision, compute_dtype
        device, count = layer.weight.device, layer.weight.numel()
        blocks = -(-count // BLOCK) if precision == "nf4" else 0
        packed, scales = (count // 2, -(-blocks // SCALES)) if precision == "nf4" else (count, layer.out_features)
        self.weight = torch.nn.Parameter(torch.zeros(packed, 1, dtype=torch.uint8, device=device), requires_grad=False)
        self.block_scales = torch.nn.Parameter(torch.zeros(blocks, dtype=torch.uint8, device=device), False)
        self.scales = torch.nn.Parameter(torch.zeros(scales, device=device), False)
        self.bias = layer.bias

    def unpacked(self) -> torch.Tensor:
        """A new tensor for the weights, (out, in)."""
        return self.scales.new_empty((self.out_features, self.in_features), dtype=self.compute_dtype)

    def bias_like(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Product.apply(input, self)  # type: ignore[no-any-return, no-untyped-call]
