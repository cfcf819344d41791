"""Frozen matrices in 8 bits, for --weights int8."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear


class Int8Product(torch.autograd.Function):
    """x W^T with W = diag(scale) q, q int8: it is cast for each product, and no float copy waits for the backward."""

    @staticmethod
    def forward(ctx, x, q, scale):
        ctx.save_for_backward(q, scale)
        return (F.linear(x, q.to(x.dtype)) * scale).to(x.dtype)  # the scale is float32: one rounding

    @staticmethod
    def backward(ctx, grad):
        q, scale = ctx.saved_tensors
        return (grad * scale).to(grad.dtype) @ q.to(grad.dtype), None, None


class Int8Linear(nn.Module):
    """A frozen Linear with W as int8, each row over its own largest entry (Dettmers et al. 2022, section 2)."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.scale = nn.Parameter(scale, requires_grad=False)  # (out,)
        self.q = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)  # (out, in)

    @property
    def weight(self):  # made anew whenever it is asked for: what is written there is lost
        return (self.q * self.scale[:, None]).to(self.dtype)

    def forward(self, x):
        y = Int8Product.apply(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias

    def dequantised(self):
        """The plain frozen Linear of the same weights."""
        linear = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        return linear
