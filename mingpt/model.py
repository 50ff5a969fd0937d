"""
GPT: a decoder-only Transformer language model, as in GPT-2.

Three things stacked: token and position embeddings, a column of identical blocks (causal self-attention and an MLP, each added
to the residual stream), and a linear map back to the vocabulary. Read it beside "Attention Is All You Need" (Vaswani et al. 2017) and
the report on GPT-2 (Radford et al. 2019), which moved the LayerNorms to the front and scaled the initialisation.

Shapes: B batch, T time, C channels (n_embd), V vocabulary, nh heads, hs = C / nh, S the keys a query may look at.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.unembed import Unembed, next_logits
from mingpt.config import CfgNode as CN, check_numbers
from mingpt.utils import adamw
from mingpt.weights import Pretrained

# n_layer, n_head, n_embd. GPT-1 (2018), GPT-2 (2019), Gopher's smallest (Rae et al. 2021, table 1), and minGPT's tiny ones
PRESETS = {
    "openai-gpt":  (12, 12, 768),    # 117M parameters
    "gpt2":        (12, 12, 768),    # 124M
    "gpt2-medium": (24, 16, 1024),   # 350M
    "gpt2-large":  (36, 20, 1280),   # 774M
    "gpt2-xl":     (48, 25, 1600),   # 1558M
    "gopher-44m":  (8, 16, 512),
    "gpt-mini":    (6, 6, 192),
    "gpt-micro":   (4, 4, 128),
    "gpt-nano":    (3, 3, 48),
}


class KVCache:
    """`keys` and `values` of every layer, (n_layer, B, nh, max_length, hs) each, of whose columns `length` are filled."""

    def __init__(self, config: CN, batch_size: int, max_length: int, like: Tensor):
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys, self.values, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, both (B, nh, T, hs), behind what `layer` already holds; return all of its keys and values."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head masked self-attention (Vaswani et al. 2017, equation 1 and section 3.2.2). (B, T, C) -> (B, T, C)."""

    def __init__(self, config: CN, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop = config.attn_pdrop
        self.n_head = config.n_head
        self.layer = layer  # which part of the cache is ours

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # a single query that may look at every key needs no mask; T queries over T keys need the causal one
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           dropout_p=self.attn_pdrop if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network with GPT-2's tanh approximation of GELU. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: CN):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Communication, then computation: attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: CN, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The trunk of GPT, RewardModel and ValueModel: (B, T) token ids -> (B, T, C) hidden states, for a head to read."""

    def __init__(self, config: CN):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of these add up in the residual stream: keep its variance
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        past = cache.length if cache is not None else 0
        check_context(idx, attention_mask, past, self.config.block_size)
        total = past + idx.size(1)
        if attention_mask is None:
            pos = torch.arange(past, total, device=idx.device)
        else:  # count real tokens only, so that padding moves nobody
            pos = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = self.visible(idx.size(1), total, attention_mask, idx.device)
        try:
            x = self.drop(self.wte(idx) + self.wpe(pos))
        except IndexError:  # on a CPU; a GPU has no words for it
            check_ids(idx, self.config.vocab_size)
            raise
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length = total
        return self.ln_f(x)

    @staticmethod
    def visible(T: int, S: int, attention_mask: Tensor | None, device) -> Tensor | None:
        """Which of S keys each of the last T queries may see: bool, True = yes; None where no explicit mask is needed."""
        if attention_mask is None and T in (1, S):
            return None
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        if attention_mask is None:
            return causal
        # a padding query sees at least itself: a softmax over nothing would be NaN and leak into the real rows
        itself = torch.eye(S, dtype=torch.bool, device=device)[S - T:]
        return (causal & attention_mask.bool()[:, None, :] | itself)[:, None]  # (B, 1, T, S)


class GPT(Pretrained, nn.Module):
    """GPT language model: the trunk and a linear head over the vocabulary.

    config comes from `GPT.get_default_config()`; set vocab_size, block_size, and either model_type (a name in PRESETS) or all of
    n_layer, n_head, n_embd. Raises ValueError for anything else.
    """

    presets = PRESETS  # for from_pretrained
    @staticmethod
    def get_default_config() -> CN:
        return CN(model_type=None, n_layer=None, n_head=None, n_embd=None,  # a preset, or else the three sizes
                  vocab_size=None, block_size=None,  # these always
                  embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1,  # dropout
                  tie_weights=True)  # one matrix embeds tokens and predicts them, as in GPT-2

    def __init__(self, config: CN):
        super().__init__()
        self.config = resolve_config(config)
        self.transformer = Transformer(self.config)
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.lm_head.apply(init_weights)
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def configure_optimizers(self, train_config: CN) -> torch.optim.Optimizer:
        """AdamW that decays the matrix-product weights alone; reads learning_rate, betas, weight_decay, eps."""
        return adamw(self, train_config)

    def forward(self, idx: Tensor, targets: Tensor | None = None, attention_mask: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) of the next token at every position, and the mean cross-entropy in nats, None without targets.

        idx (B, T) token ids, T <= block_size; targets (B, T), -1 is ignored; attention_mask (B, T), 1 = real token, on
        either side, or (B, cached + T) with a cache. Raises ValueError for wrong shapes and, where no GPU waits for it, wrong ids.
        """
        hidden = self.transformer(idx, attention_mask, cache)
        logits = Unembed.apply(hidden, self.lm_head.weight) if self.config.tie_weights else self.lm_head(hidden)
        if targets is None:
            return logits, None
        if targets.shape != idx.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, idx {tuple(idx.shape)}: they must be equal")
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def log_probs(self, idx: Tensor, attention_mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """log p(idx[:, t+1] | idx[:, :t+1]) of the tokens that are there: (B, T) -> (B, T-1), in nats, with gradients.

        The last token is never read, so T may be block_size + 1. Where t or t+1 is padding, the value means nothing.
        """
        check_numbers(CN(temperature=temperature), "temperature", low=1e-6)
        if idx.size(1) < 2:
            raise ValueError(f"log_probs needs two tokens or more to predict the second; idx has shape {tuple(idx.shape)}")
        logits, _ = self(idx[:, :-1], attention_mask=None if attention_mask is None else attention_mask[:, :-1])
        return token_log_probs(logits, idx[:, 1:], temperature)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
                 top_k: int | None = None, top_p: float | None = None, attention_mask: Tensor | None = None,
                 stop_token: int | None = None, generator: torch.Generator | None = None,
                 return_log_probs: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Continue each row of idx (B, T) by up to max_new_tokens: greedily, or sampled with do_sample=True.

        temperature > 0 divides the logits; top_k keeps the k likeliest tokens, top_p the smallest set of probability p or
        more (Holtzman et al. 2020). A row that generates stop_token is filled with it from there on; when all rows have,
        generation ends early. Prompts of unlike lengths are padded, attention_mask (B, T) saying where, and must fit into
        block_size; unpadded ones slide past it. Call `model.eval()` first to be without dropout.

        Returns (B, T + n); with return_log_probs also the (B, n) log-probabilities of the new tokens under the
        distribution they were drawn from, 0 behind the stop. Raises ValueError for arguments out of range.
        """
        check_generate(self.config, idx, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                       top_p=top_p, stop_token=stop_token)
        attention_mask = None if attention_mask is None or attention_mask.all() else attention_mask
        (B, T), block_size = idx.shape, self.config.block_size
        out = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        log_probs = torch.zeros(B, max_new_tokens, device=idx.device)
        running = torch.ones(B, dtype=torch.bool, device=idx.device)
        mask = None if attention_mask is None else F.pad(attention_mask.bool(), (0, max_new_tokens), value=True)
        cache = KVCache(self.config, B, min(T + max_new_tokens, block_size), like=self.transformer.wte.weight)
        for end in range(T, T + max_new_tokens):
            if end <= block_size:
                new, seen = out[:, cache.length:end], None if mask is None else mask[:, :end]
                hidden = self.transformer(new, seen, cache)
            else:  # learned positions move with the window, and every cached key with them: compute it afresh
                hidden = self.transformer(out[:, end - block_size:end])
            last = hidden[:, -1] if mask is None or end > T else hidden[torch.arange(B), last_real(attention_mask)]
            logits = next_logits(last, self.lm_head.weight)
            if do_sample or return_log_probs:
                log_p = next_token_log_probs(logits, temperature, top_k, top_p)
            token = torch.multinomial(log_p.exp(), 1, generator=generator) if do_sample else logits.argmax(1, keepdim=True)
            if return_log_probs:
                log_probs[:, end - T] = log_p.gather(1, token)[:, 0] * running
            out[:, end] = token[:, 0]
            if stop_token is not None:
                out[:, end].masked_fill_(~running, stop_token)
                running &= out[:, end] != stop_token
                if not running.any():
                    break
        out, log_probs = out[:, :end + 1], log_probs[:, :end + 1 - T]
        return (out, log_probs) if return_log_probs else out


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: N(0, 0.02) for weights, zero biases (Radford et al. 2019)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(tokens) (B, T), by the logits (B, T, V) that speak of them."""
    return -F.cross_entropy((logits / temperature).transpose(1, 2), tokens, reduction="none")


def next_token_log_probs(logits: Tensor, temperature=1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution to sample from: logits (B, V) -> log-probabilities (B, V), -inf where top_k or top_p cut."""
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        cut = probs.cumsum(1) - probs >= top_p  # the likelier tokens already make up p
        logits = logits.masked_fill(cut.scatter(1, order, cut), -math.inf)
    return logits.log_softmax(1)


def last_real(attention_mask: Tensor) -> Tensor:
    """Column of the last real token of each row: (B, T) mask -> (B,) long."""
    return (attention_mask.bool() * torch.arange(attention_mask.size(1), device=attention_mask.device)).argmax(1)


def resolve_config(config: CN) -> CN:
    """A copy of config with the sizes of its preset filled in; ValueError where it is contradictory or incomplete."""
    config = CN(**config.to_dict())
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    given = [size for size in sizes.values() if size is not None]
    if (config.model_type is None) != (len(given) == 3) or config.model_type and given:
        raise ValueError(f"config has model_type={config.model_type!r} and {sizes}: set the first or all the others, not both")
    if config.model_type is not None:
        if config.model_type not in PRESETS:
            raise ValueError(f"model_type={config.model_type!r} is unknown; choose from {', '.join(PRESETS)}")
        config.merge_from_dict({**dict(zip(sizes, PRESETS[config.model_type])), "model_type": None})
    check_numbers(config, "n_layer", "n_head", "n_embd", "vocab_size", "block_size", low=1, whole=True)
    check_numbers(config, "embd_pdrop", "resid_pdrop", "attn_pdrop", high=0.999)  # at 1 nothing is left
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}: heads share it equally")
    return config


def check_context(idx, attention_mask, past, block_size):
    if idx.dim() != 2:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; it must be (B, T): add the batch dimension with idx[None]")
    total = past + idx.size(1)
    if attention_mask is not None and attention_mask.shape != (idx.size(0), total):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, must be {(idx.size(0), total)}")
    if total > block_size and (attention_mask is None or attention_mask.sum(1).max() > block_size):  # padding takes no position
        raise ValueError(f"sequence of {total} tokens is longer than block_size={block_size}: shorten it, or `generate`")


def check_ids(idx, vocab_size):
    if idx.numel() and not 0 <= idx.min() <= idx.max() < vocab_size:
        raise ValueError(f"idx holds ids from {idx.min()} to {idx.max()}; the vocabulary has 0 to {vocab_size - 1}")


def check_generate(config, idx, attention_mask, **options):
    V, given = config.vocab_size, CN(**options)
    check_numbers(given, "max_new_tokens", low=1, whole=True)
    check_numbers(given, "temperature", low=1e-6)
    check_numbers(given, "top_k", low=1, high=V, whole=True, optional=True)
    check_numbers(given, "top_p", low=1e-9, high=1, optional=True)
    check_numbers(given, "stop_token", high=V - 1, whole=True, optional=True)
    if idx.dim() != 2 or idx.numel() == 0 or idx.dtype != torch.long:
        raise ValueError(f"idx is {idx.dtype} {tuple(idx.shape)}; a prompt must be a (B, T) LongTensor with T >= 1")
    check_ids(idx, V)
    if attention_mask is not None and (attention_mask.shape != idx.shape or not attention_mask.any(dim=1).all()):
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have the shape of idx {tuple(idx.shape)} "
                         "and a real token in every row")
    total = idx.size(1) + given.max_new_tokens
    if attention_mask is not None and total > config.block_size + 1 and not attention_mask.all():  # the last is never read
        raise ValueError(f"padded prompts of {idx.size(1)} + {given.max_new_tokens} new tokens do not fit into block_size="
                         f"{config.block_size}: only unpadded ones can slide past it")
