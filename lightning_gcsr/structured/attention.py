"""Multi-head attention with any number of heads, which ``nn.MultiheadAttention`` ties to the size of the embedding."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReducedMultiheadAttention", "reduced_attention", "restore_attention"]


class ReducedMultiheadAttention(nn.Module):
    """What :func:`~lightning_gcsr.shrink_units` puts in the place of an ``nn.MultiheadAttention`` that lost heads.

    It takes the same arguments, gives the same outputs and names its parameters alike. The number of heads follows from
    the rows of ``in_proj_weight``, which stand in the order query, key, value, and in each of these by head.

    Args:
        attention: The attention whose parameters are taken over, not copied.
    """

    _qkv_same_embed_dim = False  # `nn.TransformerEncoderLayer` then calls forward, and not a kernel for whole layers

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim = int(attention.head_dim)
        self.embed_dim = int(attention.embed_dim)
        self.batch_first = bool(attention.batch_first)
        self.dropout = float(attention.dropout)
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.training = attention.training

    @property
    def num_heads(self) -> int:
        """The number of heads that are left."""
        return self.in_proj_weight.shape[0] // (3 * self.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As in ``nn.MultiheadAttention``; the weights are averaged over the heads that are left."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights = self.in_proj_weight.chunk(3)
        q, k, v = F.linear(query, weights[0]), F.linear(key, weights[1]), F.linear(value, weights[2])
        bias = self.in_proj_bias
        if bias is not None:
            biases = bias.chunk(3)
            q, k, v = q + biases[0], k + biases[1], v + biases[2]
        q, k, v = self._by_head(q), self._by_head(k), self._by_head(v)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        shares: Optional[Tensor] = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask
            shares = F.dropout(scores.softmax(-1), dropout)
            mixed = shares @ v
            if average_attn_weights:
                shares = shares.mean(1)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if shares is None else shares.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), shares

    def _by_head(self, projected: Tensor) -> Tensor:
        batch, length, _ = projected.shape
        return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]
    ) -> Optional[Tensor]:
        """What is added to the scores."""
        mask: Optional[Tensor] = None
        if attn_mask is not None:
            mask = self._added(attn_mask, q)
            if mask.dim() == 3:  # one for each head of each example
                mask = mask.view(q.shape[0], -1, q.shape[2], k.shape[2])
        if key_padding_mask is not None:
            padding = self._added(key_padding_mask, q)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _added(self, mask: Tensor, like: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        return mask.to(like.dtype)


def _can_lose_heads(attention: nn.Module) -> bool:
    return (
        type(attention) is nn.MultiheadAttention
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and "forward" not in vars(attention)
        and not any(
            (
                attention._forward_hooks,
                attention._forward_pre_hooks,
                attention._backward_hooks,
                attention._backward_pre_hooks,
            )
        )
        and "in_proj_weight" in attention._parameters
    )


def _replace(module: nn.Module, replacements: dict[int, nn.Module]) -> None:
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def reduced_attention(module: nn.Module) -> list[tuple[nn.MultiheadAttention, ReducedMultiheadAttention]]:
    """Put attention that can lose heads in the place of the attention in a module; what was replaced by what."""
    found = [part for part in module.modules() if part is not module and _can_lose_heads(part)]
    pairs = [(part, ReducedMultiheadAttention(part)) for part in found if isinstance(part, nn.MultiheadAttention)]
    _replace(module, {id(old): new for old, new in pairs})
    return pairs


def restore_attention(module: nn.Module, pairs: list[tuple[nn.MultiheadAttention, ReducedMultiheadAttention]]) -> None:
    """Put the attention that lost nothing back."""
    back: dict[int, nn.Module] = {}
    for old, new in pairs:
        rows, columns = new.in_proj_weight.shape
        if rows == 3 * old.embed_dim and columns == old.embed_dim == len(new.out_proj.weight):
            old.in_proj_weight, old.in_proj_bias, old.out_proj = new.in_proj_weight, new.in_proj_bias, new.out_proj
            back[id(new)] = old
    _replace(module, back)
