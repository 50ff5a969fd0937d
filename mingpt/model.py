"""
GPT: a decoder-only Transformer language model, as in GPT-2. Read this file first.

A GPT reads token ids and says, at every position, which token may come next. It is three things,
one after the other:

1. embeddings: each token id, and each position, becomes a vector of C channels;
2. a column of identical blocks, each of which adds to these vectors twice: first by attention,
   where a token gathers from the tokens before it, then by an MLP, which takes each token alone;
3. a linear map from each final vector to one logit for every token of the vocabulary.

The file goes from the inside out: attention, MLP, block, trunk, language model. Then comes
generation, and last the checks of what users pass in. The cache of keys and values and the masks
of attention are in trunk.py, since the Llama family (llama.py) has the same.

Sources: "Attention Is All You Need" (Vaswani et al. 2017) for the architecture, and "Language
Models are Unsupervised Multitask Learners" (Radford et al. 2019), the report on GPT-2, which moved
each LayerNorm to the front of its sub-block, added one at the end, and scaled the initialisation.

Shapes in the comments: B batch, T time (tokens), C channels (n_embd), V vocabulary, nh heads,
hs head size (C / nh), S keys that a query may look at (T, and what a cache holds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.config import (
    CfgNode as CN,
    check_booleans,
    check_is_config,
    check_numbers,
    documented,
)
from mingpt.llama import LlamaTransformer
from mingpt.trunk import (
    KVCache,
    Trunk,
    check_context,
    check_ids,
    check_idx,
    check_mask_values,
    count_positions,
    init_residual_projections,
    init_weights,
    visible_keys,
)
from mingpt.unembed import LARGE_VOCABULARY, NO_TOKEN, Linear, Unembed, next_logits, row_log_probs
from mingpt.utils import adamw, check_equal_shapes, check_tensors
from mingpt.weights import Pretrained

# (n_layer, n_head, n_embd) by name: GPT-1 (Radford et al. 2018), GPT-2, the smallest Gopher
# (Rae et al. 2021, table 1), and minGPT's tiny ones.
PRESETS = {
    "openai-gpt": (12, 12, 768),    # 117M parameters
    "gpt2": (12, 12, 768),          # 124M
    "gpt2-medium": (24, 16, 1024),  # 350M
    "gpt2-large": (36, 20, 1280),   # 774M
    "gpt2-xl": (48, 25, 1600),      # 1558M
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}


# --------------------------------------------------------------------------------------------------
# the model, from the inside out


class CausalSelfAttention(nn.Module):
    """Multi-head masked self-attention (Vaswani et al. 2017, equation 1 and section 3.2.2)."""

    def __init__(self, config: CN, layer: int):
        super().__init__()
        # queries, keys and values of all heads, in one matrix
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        # mixes what the heads have gathered
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop = config.attn_pdrop
        self.n_head = config.n_head
        self.layer = layer  # our place in the cache

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). mask is from `visible_keys`; a cache holds the earlier keys."""
        B, T, C = x.shape
        # A token's query is compared with the keys of the tokens it may see, and it gathers their
        # values. Each head does so in hs channels of its own; heads join the batch dimension.
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        head_shape = (B, T, self.n_head, C // self.n_head)
        q = q.view(head_shape).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(head_shape).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(head_shape).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nh, S, hs) each
        # softmax(q kᵀ / √hs) v. The weights, (B, nh, T, S), say how much each token takes from each
        # earlier one. A single query may look at all keys; T queries over T keys must be causal.
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.attn_pdrop if self.training else 0.0,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads' outputs side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network (section 3.3), with GPT-2's tanh approximation of GELU."""

    def __init__(self, config: CN):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), each position by itself."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer: communication (attention), then computation (MLP).

    Each of the two reads x through a LayerNorm, and adds its output to x, the residual stream.
    """

    def __init__(self, config: CN, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(Trunk):
    """GPT-2's trunk: token ids (B, T) -> hidden states (B, T, C), for a head to read.

    A language model is this trunk and a head over the vocabulary; a reward model or a value
    function is the same trunk and a head to one number (heads.py). The names are GPT-2's.
    """

    slides = True  # beyond block_size, the last block_size tokens get the positions from 0

    def __init__(self, config: CN):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # word token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # word position embeddings
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(init_weights)
        # Each of the 2 * n_layer sub-blocks adds the output of its c_proj to the residual stream.
        init_residual_projections(self, ("c_proj",), config.n_layer)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the tokens, (V, C)."""
        return self.wte

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx (B, T), attention_mask (B, S) -> hidden states (B, T, C).

        A cache holds the S - T tokens before idx: it is read, and then holds idx as well.
        """
        past = cache.length if cache is not None else 0
        check_context(idx, attention_mask, past, self.config.block_size)
        total = past + idx.size(1)
        x = self.drop(self.embed(idx, attention_mask, past))  # (B, T, C)
        mask = visible_keys(idx.size(1), total, attention_mask, idx.device)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length = total
        return self.ln_f(x)

    def embed(self, idx: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
        """Token plus position embeddings, (B, T, C), of idx (B, T), which follows past tokens."""
        total = past + idx.size(1)
        positions = count_positions(total, attention_mask, idx.device)[..., past:]  # (T,) or (B, T)
        try:
            return self.wte(idx) + self.wpe(positions)
        except IndexError:  # a CPU says that some index is wrong; we can say which
            check_ids(idx, self.config.vocab_size)
            raise

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of this trunk's shapes, type and device, for `forward`."""
        config = self.config
        return KVCache(
            config.n_layer,
            batch_size,
            config.n_head,
            max_length,
            config.n_embd // config.n_head,
            like=self.wte.weight,
        )

    @classmethod
    def complete(cls, config: CN) -> None:
        """GPT-2 has no options of its own. ValueError if its heads do not divide the channels."""
        if config.n_embd % config.n_head != 0:
            raise ValueError(
                f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}: "
                "all heads get the same number of channels"
            )


# The trunk that each config.architecture names.
ARCHITECTURES: dict[str, type[Trunk]] = {"gpt2": Transformer, "llama": LlamaTransformer}


def new_trunk(config: CN) -> Trunk:
    """A trunk of the config's architecture, with new weights."""
    return ARCHITECTURES[config.architecture](config)


class GPT(Pretrained, nn.Module):
    """GPT language model: the trunk, and a linear head over the vocabulary.

    config comes from `GPT.get_default_config()`. Set vocab_size, block_size, and either model_type
    (a name in PRESETS) or all of n_layer, n_head, n_embd. Raises ValueError for anything else.
    """

    presets = PRESETS  # from_pretrained looks up here what a config of minGPT's names

    @staticmethod
    @documented
    def get_default_config() -> CN:
        """All options of a model, with their defaults."""
        return CN(
            architecture="gpt2",  # or llama: the trunk, a name in ARCHITECTURES
            # Either a preset or the three sizes.
            model_type=None,   # name in PRESETS
            n_layer=None,      # number of blocks
            n_head=None,       # attention heads of a block, a divisor of n_embd
            n_embd=None,       # channels of the residual stream
            # These two always.
            vocab_size=None,   # number of token ids
            block_size=None,   # longest context, in tokens
            # Probabilities of dropout.
            embd_pdrop=0.1,    # of the embeddings
            resid_pdrop=0.1,   # of what a sub-block adds to the residual stream
            attn_pdrop=0.1,    # of the attention weights
            # GPT-2 ties its weights.
            tie_weights=True,  # one matrix embeds tokens and predicts them
            # Only with architecture="llama"; None is the first Llama's.
            n_kv_head=None,    # heads of keys and values, a divisor of n_head; None: n_head
            n_inner=None,      # channels inside the MLP; None: 8/3 n_embd, a multiple of 8
            head_size=None,    # channels of a head; None: n_embd / n_head
            rope_theta=None,   # base of the rotary frequencies; None: 10000
            rope_scaling=None,  # for longer contexts: a dict in Hugging Face's words
            norm_eps=None,     # added to the mean square in every RMSNorm; None: 1e-5
            attention_bias=None,  # biases for queries, keys and values (Qwen2); None: False
            output_bias=None,  # a bias for the attention's output; None: False
            query_key_norm=None,  # norms of the queries and keys of a head (Qwen3); None: False
            sliding_window=None,  # how many tokens a token sees (Mistral); None: all
        )

    def __init__(self, config: CN):
        super().__init__(resolve_config(config))
        self.transformer = new_trunk(self.config)
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.lm_head.apply(init_weights)
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.embedding.weight

    def configure_optimizers(self, train_config: CN) -> torch.optim.Optimizer:
        """AdamW that decays only the weights of matrix products.

        Reads learning_rate, betas, weight_decay and eps from train_config.
        """
        return adamw(self, train_config)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) of the next token at every position, and the mean loss in nats.

        idx (B, T) holds token ids, T <= block_size. targets (B, T) holds the tokens that follow, -1
        is ignored; without targets the loss is None. attention_mask (B, T) is 1 at real tokens and
        0 at padding, on either side; with a cache it is (B, cached + T).
        Raises ValueError for wrong shapes, and on a CPU for ids outside the vocabulary (on a GPU
        that check would force a sync).
        """
        hidden = self.transformer(idx, attention_mask, cache)  # (B, T, C)
        if self.config.tie_weights:
            logits = Unembed.apply(hidden, self.lm_head.weight)  # (B, T, V)
        else:
            logits = self.lm_head(hidden)  # (B, T, V)
        if targets is None:
            return logits, None
        check_tensors(targets=targets)
        if targets.shape != idx.shape:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} and idx {tuple(idx.shape)}: "
                "they must be equal"
            )
        try:
            return logits, mean_loss(logits, targets)
        except (IndexError, RuntimeError):  # a CPU says that something is wrong with the targets
            check_targets(targets, self.config.vocab_size)
            raise

    def log_probs(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """log p(idx[:, t+1] | idx[:, :t+1]) of given tokens, in nats: (B, T) -> (B, T-1).

        The logits are divided by temperature > 0. Gradients flow. Nothing is predicted from the
        last token, so T may be block_size + 1. Where t or t+1 is padding, the value means nothing.
        """
        check_numbers(CN(temperature=temperature), "temperature", low=1e-6)
        check_idx(idx)
        if attention_mask is not None:
            check_equal_shapes(idx=idx, attention_mask=attention_mask)
        if idx.size(1) < 2:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}; log_probs needs two tokens or more: "
                "the first token is never predicted"
            )
        if attention_mask is not None:
            attention_mask = attention_mask[:, :-1]
        logits, _ = self(idx[:, :-1], attention_mask=attention_mask)  # (B, T-1, V)
        return token_log_probs(logits, idx[:, 1:], temperature)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        stop_token: int | list[int] | tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        return_log_probs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Continue each row of idx (B, T) by up to max_new_tokens: greedily, or by sampling.

        `Sampling` explains temperature, do_sample, top_k, top_p, stop_token and generator. A row
        that generates a stop token is filled with it; when all rows have ended, so does generation.
        Prompts of different lengths are padded, on either side, where attention_mask (B, T) is 0.
        Padded prompts and their continuations must fit into block_size, and those of a Llama in any
        case. Others slide past it: the model then sees the last block_size tokens. To turn off
        dropout, call `model.eval()` first.

        Returns (B, T + n). With return_log_probs also returns the new tokens' log-probabilities,
        (B, n), in the distribution that they were chosen from: in nats, and 0 after a stop token.
        Raises ValueError for arguments out of range.
        """
        columns = self.stream(
            idx,
            max_new_tokens,
            temperature,
            do_sample,
            top_k,
            top_p,
            attention_mask,
            stop_token,
            generator,
            return_log_probs,
        )
        if not return_log_probs:
            return torch.cat([idx, *columns], dim=1)
        tokens, log_probs = zip(*columns, strict=True)
        return torch.cat([idx, *tokens], dim=1), torch.cat(log_probs, dim=1)

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        stop_token: int | list[int] | tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        return_log_probs: bool = False,
    ) -> Iterator[Any]:
        """Generate as `generate` does, and yield each new column as soon as it is there.

        Yields tokens (B, 1), or with return_log_probs pairs of tokens (B, 1) and log-probs (B, 1).
        The arguments are checked by this call, not by the first `next`: ValueError if one is wrong.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            stop_token=stop_token,
            generator=generator,
            return_log_probs=return_log_probs,
        )
        check_generate(self.config, idx, attention_mask, **vars(sampling))
        if attention_mask is not None and attention_mask.all():
            attention_mask = None  # no padding: attention is faster without a mask
        return self._columns(idx, attention_mask, sampling)

    @torch.no_grad()  # for a generator, PyTorch applies it while we run, not while our caller does
    def _columns(
        self,
        idx: Tensor,
        attention_mask: Tensor | None,
        sampling: Sampling,
    ) -> Iterator[Any]:
        """The loop behind `stream`: read the newest tokens, choose the next ones, append them."""
        B, T = idx.shape
        n = int(sampling.max_new_tokens)
        tokens = F.pad(idx, (0, n))  # (B, T + n): the prompts, and room for what follows
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask.bool(), (0, n), value=True)  # (B, T + n)
        cache = self.transformer.new_cache(B, min(T + n, self.config.block_size))
        stops = torch.tensor(stop_ids(sampling.stop_token), dtype=torch.long, device=idx.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        for end in range(T, T + n):
            hidden = self._last_hidden(tokens[:, :end], attention_mask, cache)  # (B, C)
            logits = next_logits(hidden, self.lm_head.weight)  # (B, V)
            column, log_p = sampling.choose(logits)  # (B, 1) each
            if len(stops) > 0:
                # A row that has ended repeats its stop token, and so it stays ended.
                column = torch.where(ended, tokens[:, end - 1:end], column)
                if log_p is not None:
                    log_p = log_p.masked_fill(ended, 0.0)
                ended = (column == stops).any(dim=1, keepdim=True)
            tokens[:, end:end + 1] = column
            if sampling.return_log_probs:
                yield column, log_p
            else:
                yield column
            if len(stops) > 0 and ended.all():
                return

    def _last_hidden(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """The hidden state at the last token of each row: tokens (B, T) -> (B, C).

        The trunk reads only those tokens that are not in the cache: first the prompt, then one.
        """
        B, end = tokens.shape
        block_size = self.config.block_size
        if end > block_size:
            # The window slides. Each token in it now has another position, and with it other keys
            # and values than the cached ones: the whole window is read again.
            return self.transformer(tokens[:, -block_size:])[:, -1]
        is_prompt = cache.length == 0
        if attention_mask is not None:
            attention_mask = attention_mask[:, :end]
        hidden = self.transformer(tokens[:, cache.length:], attention_mask, cache)
        if attention_mask is not None and is_prompt:
            # With padding on the right, a prompt's last token is not in the last column.
            return hidden[torch.arange(B, device=tokens.device), last_real(attention_mask)]
        return hidden[:, -1]


# --------------------------------------------------------------------------------------------------
# generation: how the next token is chosen


@dataclass
class Sampling:
    """How the next tokens are chosen: what a call of `GPT.generate` or `GPT.stream` asks for."""

    # At most this many new columns.
    max_new_tokens: int
    # Divides the logits. 0 means greedy whatever do_sample says, with the log-probs of 1.
    temperature: float
    # Draw from the distribution; False takes the most likely token (greedy).
    do_sample: bool
    # Keep only the k most likely tokens; None keeps all.
    top_k: int | None
    # Keep only the fewest tokens whose probabilities add up to p (Holtzman et al. 2020).
    top_p: float | None
    # The id, or ids, that end a row when it generates one of them; None lets every row go on.
    stop_token: int | list[int] | tuple[int, ...] | None
    # Where the randomness comes from; None is PyTorch's global generator.
    generator: torch.Generator | None
    # Also give the log-probabilities of the chosen tokens.
    return_log_probs: bool

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next token of each row: logits (B, V) -> tokens (B, 1), log-probs (B, 1).

        The log-probs are None when nobody needs them.
        """
        greedy = self.temperature == 0 or not self.do_sample
        if greedy and not self.return_log_probs:
            return logits.argmax(dim=1, keepdim=True), None
        temperature = 1.0 if self.temperature == 0 else self.temperature
        log_p = next_token_log_probs(logits, temperature, self.top_k, self.top_p)  # (B, V)
        tokens = (
            logits.argmax(dim=1, keepdim=True) if greedy else draw(log_p.exp(), self.generator)
        )
        return tokens, log_p.gather(1, tokens)


def next_token_log_probs(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The distribution to sample from: logits (B, V) -> log-probabilities (B, V).

    Tokens that top_k or top_p leaves out get -inf; the others are normalised again.
    """
    logits = logits.float() / temperature
    if top_k is not None:
        kth_largest = logits.topk(top_k).values[:, [-1]]  # (B, 1)
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    if top_p is not None and top_p < 1:
        logits = logits.masked_fill(~nucleus(logits.softmax(1), top_p), -math.inf)
    return logits.log_softmax(1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Which tokens top_p keeps: (B, V) -> (B, V) mask (Holtzman et al. 2020, section 3.1).

    They are the likeliest ones that together reach top_p, and at least one.
    """
    tokens = torch.arange(probs.size(1), device=probs.device).expand_as(probs)
    if probs.is_cpu and probs.size(1) > LARGE_VOCABULARY:
        # Sorting them all would take longer than a layer of the model. The tokens below (1 - p) / V
        # add up to less than 1 - p, so that none of them is kept: sort the others alone.
        n_likely = int((probs >= (1 - top_p) / probs.size(1)).sum(1).max())
        if n_likely < probs.size(1) // 4:
            tokens = probs.topk(n_likely).indices.sort(dim=1).values  # (B, n_likely)
    # Sort by probability. A token is kept unless the more likely ones add up to p without it.
    sorted_probs, order = probs.gather(1, tokens).sort(dim=1, descending=True, stable=True)
    kept = sorted_probs.cumsum(1) - sorted_probs < top_p
    nothing = torch.zeros_like(probs, dtype=torch.bool)
    return nothing.scatter(1, tokens.gather(1, order), kept)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token of each row, by its probability: (B, V) -> (B, 1)."""
    if probs.is_cpu and probs.size(1) > LARGE_VOCABULARY:
        # torch.multinomial draws a random number for each token. One for each row will do: the
        # tokens share [0, 1) among them, and it falls into the share of one of them.
        shares_end = probs.cumsum(1, dtype=torch.float64)  # (B, V)
        total = shares_end[:, -1:]  # 1, but for rounding
        if total.isfinite().all():
            u = total * torch.rand(total.shape, dtype=torch.float64, generator=generator)
            return torch.searchsorted(shares_end, u, right=True)  # the first that ends behind u
    return torch.multinomial(probs, 1, generator=generator)  # which complains of NaN


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -log p(targets), in nats, without targets of -1: (B, T, V), (B, T) -> ().

    In fp32, also where the logits are not.
    """
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()  # (B·T, V), (B·T,)
    if logits.size(1) <= LARGE_VOCABULARY:
        return F.cross_entropy(logits, targets, ignore_index=-1)
    counts = targets != -1
    log_probs = row_log_probs(logits, targets.masked_fill(~counts, 0))
    return -log_probs.masked_fill(~counts, 0).sum() / counts.sum()


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(tokens), in nats, under the logits that predict them: (B, T, V), (B, T) -> (B, T).

    In fp32, also where the logits are not: a difference of log-probs is what RLHF learns from.
    """
    logits = logits.float()
    if temperature != 1:  # dividing by 1 would be one more copy of the largest tensor there is
        logits = logits / temperature
    try:
        if logits.size(-1) > LARGE_VOCABULARY:
            return row_log_probs(logits.flatten(0, 1), tokens.flatten()).view(tokens.shape)
        return -F.cross_entropy(
            logits.transpose(1, 2), tokens, reduction="none", ignore_index=NO_TOKEN
        )
    except (IndexError, RuntimeError):  # a CPU says that some token is wrong; we can say which
        check_ids(tokens, logits.size(-1))
        raise


def last_real(attention_mask: Tensor) -> Tensor:
    """Column of the last real token of each row: (B, T) mask -> (B,) LongTensor."""
    columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
    return (attention_mask.bool() * columns).argmax(1)


def stop_ids(stop_token: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """stop_token, which may be None, an id or several, as a list of ids. ValueError for others."""
    if stop_token is None:
        return []
    stops = list(stop_token) if isinstance(stop_token, (list, tuple)) else [stop_token]
    if not stops:
        raise ValueError("stop_token is an empty list: pass ids, or None if no token ends a row")
    for stop_id in stops:
        check_numbers(CN(stop_token=stop_id), "stop_token", whole=True)
    return [int(stop_id) for stop_id in stops]


# --------------------------------------------------------------------------------------------------
# checks of what users pass in


def resolve_config(config: CN) -> CN:
    """A copy of config with all that is None filled in; ValueError if it is inconsistent.

    The sizes come from its preset, and the options of a Llama from the trunk.
    """
    config = copy_config(config)
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    sizes_set = [size is not None for size in sizes.values()]
    by_preset = config.model_type is not None and not any(sizes_set)
    by_sizes = config.model_type is None and all(sizes_set)
    if not by_preset and not by_sizes:
        raise ValueError(
            f"config has model_type={config.model_type!r} and sizes {sizes}: "
            "set either model_type or all three sizes, not both"
        )
    if by_preset:
        if config.model_type not in PRESETS:
            names = ", ".join(PRESETS)
            raise ValueError(f"model_type={config.model_type!r} is unknown; choose from {names}")
        preset_sizes = dict(zip(sizes, PRESETS[config.model_type], strict=True))
        config.merge_from_dict({**preset_sizes, "model_type": None})
    whole_numbers = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    check_numbers(config, *whole_numbers, low=1, whole=True)
    # Dropout with probability 1 would leave no signal.
    check_numbers(config, "embd_pdrop", "resid_pdrop", "attn_pdrop", high=0.999)
    check_booleans(config, "tie_weights")
    check_architecture(config)
    return config


def copy_config(config: CN) -> CN:
    """A copy of config. ValueError for options that a model does not have, and for missing ones."""
    check_is_config(config, "GPT")
    copy = CN()
    copy.merge_from_dict(config.to_dict())
    known = vars(GPT.get_default_config())
    unknown = sorted(vars(copy).keys() - known.keys())
    if unknown:
        raise ValueError(f"a model has no options {unknown}; it has {', '.join(known)}")
    # Configs that were saved before there were architectures lack these options.
    newer = {"architecture", *(name for trunk in ARCHITECTURES.values() for name in trunk.options)}
    copy.merge_from_dict({name: known[name] for name in newer - vars(copy).keys()})
    missing = sorted(known.keys() - vars(copy).keys())
    if missing:
        raise ValueError(
            f"the config lacks the options {missing}: begin with GPT.get_default_config()"
        )
    return copy


def check_architecture(config: CN) -> None:
    """Complete the options of the trunk. ValueError for those of other architectures."""
    architecture = config.architecture
    if architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture={architecture!r} is unknown; choose from {names}")
    for other, trunk in ARCHITECTURES.items():
        for name in trunk.options:
            if other != architecture and getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is an option of architecture={other!r}, and "
                    f"this config has architecture={architecture!r}: leave {name} None"
                )
    ARCHITECTURES[architecture].complete(config)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """ValueError if a target is neither in the vocabulary nor -1, or they are no LongTensor."""
    if targets.dtype != torch.long:
        raise ValueError(f"targets are {targets.dtype}; they must be a LongTensor of token ids")
    low, high = targets.min(), targets.max()
    if low < -1 or high >= vocab_size:
        raise ValueError(
            f"targets hold ids from {low} to {high}; the vocabulary has 0 to {vocab_size - 1}, and "
            "-1 is ignored"
        )


def check_generate(
    config: CN,
    idx: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> None:
    """ValueError unless prompts and options (the fields of `Sampling`) suit a model of config."""
    check_sampling(CN(**options), config.vocab_size)
    if not isinstance(idx, Tensor):
        raise TypeError(
            f"idx is a {type(idx).__name__}; a prompt must be a (B, T) LongTensor, as tok(text) of "
            "a tokenizer gives it"
        )
    if idx.dim() != 2 or idx.numel() == 0 or idx.dtype != torch.long:
        raise ValueError(
            f"idx is {idx.dtype} of shape {tuple(idx.shape)}; "
            "a prompt must be a (B, T) LongTensor with T >= 1"
        )
    check_ids(idx, config.vocab_size)
    T, n, block_size = idx.size(1), options["max_new_tokens"], config.block_size
    # The last token is chosen but never read: there is room for one more than block_size.
    fits = T + n <= block_size + 1
    if not fits and not ARCHITECTURES[config.architecture].slides:
        raise ValueError(
            f"prompts of {T} tokens and {n} new ones do not fit into block_size={block_size}, and "
            f"a model of architecture={config.architecture!r} reads no more: ask for fewer"
        )
    if attention_mask is None:
        return
    check_tensors(attention_mask=attention_mask)
    check_mask_values(attention_mask)
    if attention_mask.shape != idx.shape or not attention_mask.any(dim=1).all():
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} must have the shape of idx, "
            f"{tuple(idx.shape)}, and a real token in every row"
        )
    if not fits and not attention_mask.all():
        raise ValueError(
            f"padded prompts of {T} tokens and {n} new ones do not fit into "
            f"block_size={block_size}: ask for fewer, or pass prompts without padding, which slide"
        )


def check_sampling(options: CN, vocab_size: int) -> None:
    """ValueError for the first option of generation that is out of range."""
    check_numbers(options, "max_new_tokens", low=1, whole=True)
    check_numbers(options, "temperature")
    if 0 < options.temperature < 1e-6:
        raise ValueError(
            f"temperature={options.temperature!r} is too small to divide logits by: "
            "pass 0 for greedy decoding, or at least 1e-6"
        )
    check_numbers(options, "top_k", low=1, high=vocab_size, whole=True, optional=True)
    check_numbers(options, "top_p", low=1e-9, high=1, optional=True)
    check_booleans(options, "do_sample", "return_log_probs")
    if not isinstance(options.generator, (torch.Generator, NoneType)):
        got = f"{type(options.generator).__name__} {options.generator!r:.60}"
        raise TypeError(f"generator is {got}; expected a torch.Generator or None")
    for stop_id in stop_ids(options.stop_token):
        check_numbers(CN(stop_token=stop_id), "stop_token", high=vocab_size - 1, whole=True)
