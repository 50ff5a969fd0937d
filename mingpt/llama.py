"""
The Llama family: what Llama, Mistral, Qwen2, Qwen3 and SmolLM2 do differently from GPT-2.

Read model.py first. The plan is the same: embeddings, a column of blocks which add attention and
then an MLP to the residual stream, and a last norm. Llama (Touvron et al. 2023) put together what
had been found to work better in each place:

    GPT-2                         Llama
    LayerNorm                     RMSNorm, which only divides by the size    Zhang & Sennrich 2019
    learned positions, added      rotary positions: queries and keys turn    Su et al. 2021
    to the embeddings
    GELU in the MLP               SwiGLU: one half gates the other           Shazeer 2020
    a key and a value for         grouped queries: several query heads       Ainslie et al. 2023
    every head                    share one
    biases                        none

Its relatives change little more: Qwen2 has biases for queries, keys and values, Qwen3 norms the
queries and keys of each head instead, and Mistral lets a token see a window of the tokens before it
(Jiang et al. 2023). Each of these is an option of the config.

The file goes from the inside out: norm, rotary positions, attention, MLP, block, trunk. Then come
the options. The parameters have the names that Hugging Face gives them.

Sources: "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al. 2023,
arXiv:2302.13971), "Root Mean Square Layer Normalization" (Zhang & Sennrich 2019, arXiv:1910.07467),
"RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al. 2021, arXiv:2104.09864),
"GLU Variants Improve Transformer" (Shazeer 2020, arXiv:2002.05202), "GQA: Training Generalized
Multi-Query Transformer Models" (Ainslie et al. 2023, arXiv:2305.13245), "Mistral 7B" (Jiang et al.
2023, arXiv:2310.06825). For longer contexts: "Extending Context Window of Large Language Models via
Positional Interpolation" (Chen et al. 2023, arXiv:2306.15595), and Llama 3.1's own way (Grattafiori
et al. 2024, arXiv:2407.21783, with the model's code).

Shapes in the comments: B batch, T time (tokens), C channels (n_embd), nh query heads, nkv heads of
keys and values, hs head size, S keys that a query may look at (T, and what a cache holds).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.config import CfgNode as CN, check_booleans, check_numbers
from mingpt.trunk import (
    KVCache,
    Trunk,
    check_context,
    check_ids,
    count_positions,
    init_residual_projections,
    init_weights,
    visible_keys,
)
from mingpt.unembed import Linear

# What each kind of rope_scaling must say, by Hugging Face's names.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


# --------------------------------------------------------------------------------------------------
# the model, from the inside out


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, equation 4).

    LayerNorm without the mean that it subtracts and the bias that it adds: what helps training is
    that all vectors have one size.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size), computed in fp32 also where x is in half precision."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotation_angles(config: CN, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with: (cos, ±sin) of each channel's angle, (..., T, hs) each.

    Pair i turns by theta_i = rope_theta^(-2i / hs) with each position (Su et al. 2021, equation
    15): the first pair by a radian for every token, the last one by very little. In fp32 whatever
    the model has, since half precision cannot count to the end of a long context.
    """
    exponents = torch.arange(0, config.head_size, 2, device=positions.device) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents  # (hs / 2,), in radians a token
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[..., None].float() * frequencies  # (..., T, hs / 2)
    cos, sin = angles.cos(), angles.sin()
    # Both channels of a pair, i and i + hs / 2, turn by one angle.
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def scale_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow the rotation down, so that a context longer than the trained one has no new angles.

    Linear scaling (Chen et al. 2023) slows all pairs by `factor`. Llama 3.1 leaves those pairs
    alone that turn often within the original context: they tell neighbours apart. It slows those
    that turn less than once or so, and blends between the two.
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed by factor, 1: as it was
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels of queries or keys x (B, heads, T, hs) by its angle.

    A pair (a, b) is a point in the plane. When a query at position m is multiplied with a key at
    position n, both turned, the result depends on m - n only: attention sees distances. Channel i
    of a head pairs with channel i + hs / 2, as in Hugging Face's files (the paper pairs neighbours,
    which is the same up to the order of the channels).
    """
    cos, sin = rotation  # (T, hs) each, or (B, 1, T, hs)
    turning = x.float()
    partner = turning.roll(x.size(-1) // 2, dims=-1)  # the other channel of each pair
    # a becomes a cos - b sin, and b becomes b cos + a sin: the sign of sin is in `rotation`.
    return torch.addcmul(turning * cos, partner, sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023) and rotary positions."""

    def __init__(self, config: CN, layer: int):
        super().__init__()
        hs = config.head_size
        bias = config.attention_bias
        self.q_proj = Linear(config.n_embd, config.n_head * hs, bias=bias)
        # Fewer heads of keys and values: the cache gets smaller by the same factor.
        self.k_proj = Linear(config.n_embd, config.n_kv_head * hs, bias=bias)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * hs, bias=bias)
        # mixes what the heads have gathered
        self.o_proj = Linear(config.n_head * hs, config.n_embd, bias=config.output_bias)
        self.query_key_norm = config.query_key_norm
        if self.query_key_norm:
            self.q_norm = RMSNorm(hs, config.norm_eps)
            self.k_norm = RMSNorm(hs, config.norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop = config.attn_pdrop
        self.head_size = hs
        self.layer = layer  # our place in the cache

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). mask is from `visible_keys`; a cache holds the earlier keys."""
        B, T, _ = x.shape
        head_shape = (B, T, -1, self.head_size)
        q = self.q_proj(x).view(head_shape)  # (B, T, nh, hs)
        k = self.k_proj(x).view(head_shape)  # (B, T, nkv, hs)
        v = self.v_proj(x).view(head_shape)  # (B, T, nkv, hs)
        if self.query_key_norm:  # scores then cannot grow without bound (Qwen3)
            q, k = self.q_norm(q), self.k_norm(k)
        # Positions enter here, and in every layer, instead of once with the embeddings. The values
        # are not turned: what a token gathers does not depend on where it was found.
        q = rotate(q.transpose(1, 2), rotation)  # (B, nh, T, hs)
        k = rotate(k.transpose(1, 2), rotation)  # (B, nkv, T, hs)
        v = v.transpose(1, 2)  # (B, nkv, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nkv, S, hs) each
        # Query head i uses the keys and values of head i // (nh / nkv).
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            enable_gqa=True,
        )
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, nh·hs), the heads' outputs side by side
        return self.resid_dropout(self.o_proj(y))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, equation 6).

    silu(z) = z · sigmoid(z). There are three matrices where GPT-2 has two, so an inner size of 2/3
    of GPT-2's gives as many parameters.
    """

    def __init__(self, config: CN):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), each position by itself."""
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, n_inner)
        return self.dropout(self.down_proj(x))


class DecoderLayer(nn.Module):
    """One layer, as in GPT-2: attention, then the MLP.

    Each of the two reads x through a norm, and adds its output to x, the residual stream.
    """

    def __init__(self, config: CN, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class LlamaTransformer(Trunk):
    """The trunk of the Llama family: token ids (B, T) -> hidden states (B, T, C)."""

    options = (
        "n_kv_head",
        "n_inner",
        "head_size",
        "rope_theta",
        "rope_scaling",
        "norm_eps",
        "attention_bias",
        "output_bias",
        "query_key_norm",
        "sliding_window",
    )

    def __init__(self, config: CN):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.apply(init_weights)
        init_residual_projections(self, ("o_proj", "down_proj"), config.n_layer)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the tokens, (V, C)."""
        return self.embed_tokens

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx (B, T), attention_mask (B, S) -> hidden states (B, T, C).

        A cache holds the S - T tokens before idx: it is read, and then holds idx as well.
        Raises ValueError for more than block_size tokens: that far the model has learned to count.
        """
        past = cache.length if cache is not None else 0
        check_context(idx, attention_mask, past, self.config.block_size)
        total = past + idx.size(1)
        x = self.drop(self.embed(idx))  # (B, T, C)
        # All layers turn by the same angles, and see the same keys.
        positions = count_positions(total, attention_mask, idx.device)[..., past:]  # (T,) or (B, T)
        if attention_mask is not None:
            positions = positions[:, None]  # (B, 1, T), the same for all heads
        rotation = rotation_angles(self.config, positions)
        window = self.config.sliding_window
        mask = visible_keys(idx.size(1), total, attention_mask, idx.device, window)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        if cache is not None:
            cache.length = total
        return self.norm(x)

    def embed(self, idx: Tensor) -> Tensor:
        """The embeddings (B, T, C) of tokens (B, T), which know nothing of positions."""
        try:
            return self.embed_tokens(idx)
        except IndexError:  # a CPU says that some index is wrong; we can say which
            check_ids(idx, self.config.vocab_size)
            raise

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of this trunk's shapes, type and device, for `forward`."""
        config = self.config
        return KVCache(
            config.n_layer,
            batch_size,
            config.n_kv_head,
            max_length,
            config.head_size,
            like=self.embed_tokens.weight,
        )

    @classmethod
    def complete(cls, config: CN) -> None:
        """Fill in the family's options where they are None. ValueError if any is wrong."""
        fill_in_defaults(config)
        check_numbers(config, "n_kv_head", "n_inner", "head_size", low=1, whole=True)
        check_numbers(config, "sliding_window", low=1, whole=True, optional=True)
        check_numbers(config, "rope_theta", low=1)
        check_numbers(config, "norm_eps", low=0, high=1)
        check_booleans(config, "attention_bias", "output_bias", "query_key_norm")
        config.rope_scaling = check_rope_scaling(config.rope_scaling)
        check_combination(config)
        if config.n_head % config.n_kv_head != 0:
            raise ValueError(
                f"n_head={config.n_head} is not divisible by n_kv_head={config.n_kv_head}: as many "
                "queries must share each head of keys and values"
            )
        if config.head_size % 2 != 0:
            raise ValueError(
                f"head_size={config.head_size} is odd: rotary positions turn pairs of channels. "
                "Choose n_embd and n_head so that n_embd / n_head is even, or set head_size"
            )


# --------------------------------------------------------------------------------------------------
# the options


def fill_in_defaults(config: CN) -> None:
    """Replace None by what the first Llama has: as many heads of keys as of queries, no biases."""
    if config.head_size is None and config.n_embd % config.n_head != 0:
        raise ValueError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}: change one of "
            "them, or set head_size"
        )
    two_thirds = math.ceil(8 * config.n_embd / 3)  # of GPT-2's 4C
    defaults = {
        "n_kv_head": config.n_head,
        "n_inner": 8 * math.ceil(two_thirds / 8),
        "head_size": config.n_embd // config.n_head,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "attention_bias": False,
        "output_bias": False,
        "query_key_norm": False,
    }
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def check_combination(config: CN) -> None:
    """ValueError for options that no model of the family has together.

    transformers has a class for each model, and none for such a mixture: it could not be saved.
    """
    attention_bias, output_bias = config.attention_bias, config.output_bias
    norm, window = config.query_key_norm, config.sliding_window
    # Llama and Qwen3 have all four biases or none, and Qwen2 has three. Mistral has none.
    wrong_biases = output_bias and not attention_bias
    wrong_norm = norm and attention_bias != output_bias
    wrong_window = window is not None and output_bias and not norm
    if wrong_biases or wrong_norm or wrong_window:
        raise ValueError(
            f"no model of the family has attention_bias={attention_bias}, "
            f"output_bias={output_bias}, query_key_norm={norm} and sliding_window={window} "
            "together: leave out one of them"
        )


def check_rope_scaling(scaling: Any) -> dict[str, Any] | None:
    """rope_scaling with nothing in it but what is used; ValueError if it is none of ours."""
    if isinstance(scaling, CN):
        scaling = scaling.to_dict()
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling={scaling!r} must be a dict, as in Hugging Face's configs")
    kind = scaling.get("rope_type", scaling.get("type"))  # its name until 2024
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ValueError(f"rope_scaling has rope_type={kind!r}; ours are default, {known}")
    names = ROPE_SCALINGS[kind]
    missing = [name for name in names if name not in scaling]
    if missing:
        raise ValueError(f"rope_scaling={scaling} lacks {missing}, which rope_type={kind!r} needs")
    numbers = CN(**{name: scaling[name] for name in names})
    check_numbers(numbers, *names, low=1e-6)
    if kind == "llama3" and numbers.low_freq_factor >= numbers.high_freq_factor:
        raise ValueError(f"rope_scaling={scaling} must have low_freq_factor < high_freq_factor")
    return {"rope_type": kind, **numbers.to_dict()}
