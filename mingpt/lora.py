"""
Low-rank adapters: teach a model something new, and leave its weights as they are.

Fine-tuning changes every weight matrix W of a model by some ΔW. Hu et al. 2021 (LoRA,
arXiv:2106.09685) keep W frozen and learn ΔW alone, as a product of two thin matrices:

    y = W x + α/r · B A x        W (out, in),  A (r, in),  B (out, r),  r the rank

B starts at zero, so at first nothing has changed. Only A and B are trained: of a model with 135M
weights about 5M, with gradients and Adam's means for these only. An *adapter* is such a pair for
each of a model's layers.

    lora.add(model)                           now the model trains an adapter, and nothing else
    with lora.disabled(model): ...            the model as it was before, bit for bit
    lora.save_pretrained(model, "adapter")    in the format of Hugging Face's `peft`
    lora.merge(model)                         W becomes W + ΔW: an ordinary model again

A trunk can carry several adapters, one of which is on at a time. So one set of frozen weights can
serve several models. `ValueModel.on(policy)` and `RewardModel.on(policy)` (heads.py) are a head and
an adapter of their own on the policy's trunk, and the reference policy is the trunk with the
adapter off. PPO then holds one large model in the place of four.

How it works: a forward hook on each linear layer adds α/r · B A x of the adapter that is on. The
layers themselves, and the names of their weights, stay as they are. A model on another one's trunk
has an `AdaptedTrunk` as its `transformer`: it turns its own adapter on for as long as it reads.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mingpt.checkpoint import atomic_write, read_json, to_json, write_text, write_together
from mingpt.config import CfgNode, check_numbers
from mingpt.model import GPT
from mingpt.model_files import load_file, write_safetensors
from mingpt.trunk import KVCache, Trunk
from mingpt.weights import FAMILIES, Pretrained, empty_model, fill

logger = logging.getLogger("mingpt")

# --------------------------------------------------------------------------------------------------
# an adapter, from the inside out


class LowRank(nn.Module):
    """ΔW = α/r · B A of one linear layer (Hu et al. 2021, section 4.1), in fp32."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        device = layer.weight.device
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        # The authors' code starts A as nn.Linear does. With B = 0, ΔW is 0 whatever A is.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + ΔW x: x (..., in), y (..., out) -> (..., out), in y's type."""
        # Where the model is in half precision, we still compute in fp32. Under autocast the
        # products are in half precision, as all others.
        x = self.dropout(x.to(self.A.dtype))
        hidden = F.linear(x, self.A)  # (..., r)
        if hidden.dtype != y.dtype:
            return y + (self.scale * F.linear(hidden, self.B)).to(y.dtype)
        # The product and the sum in one, which is much faster: B A x never lies in memory.
        rows = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), self.B.t(), alpha=self.scale)
        return rows.view(y.shape)

    def delta(self) -> Tensor:
        """ΔW, (out, in)."""
        return self.scale * (self.B @ self.A)


class Adapter(nn.Module):
    """One adapter: a LowRank for each of some layers of a trunk.

    The layers are called by their names in the trunk, `h.0.attn.c_attn` for instance, and so are
    the parameters: `h.0.attn.c_attn.A`.
    """

    def __init__(
        self,
        layers: dict[str, nn.Linear],
        rank: int,
        alpha: float,
        dropout: float,
    ):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        # The same modules twice: by the layer's name, and as modules within modules, so that
        # PyTorch knows their parameters. (A module's name has no dots.)
        self.updates: dict[str, LowRank] = {}
        for name, layer in layers.items():
            self.updates[name] = LowRank(layer, rank, alpha, dropout)
            *parents, last = name.split(".")
            parent: nn.Module = self
            for step in parents:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            parent.add_module(last, self.updates[name])

    def is_fresh(self) -> bool:
        """Whether it changes nothing yet: every B is zero."""
        return not any(update.B.any() for update in self.updates.values())


class Switch:
    """Which adapter is on; None for none. All layers of a trunk look at the same one."""

    def __init__(self, on: Adapter | None = None):
        self.on = on


class AddUpdate:
    """A forward hook of one linear layer: adds ΔW x of the adapter that is on, if any."""

    def __init__(self, switch: Switch, layer: str):
        self.switch = switch
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """y of the layer -> y + ΔW x. None leaves y as it is."""
        adapter = self.switch.on
        if adapter is None or self.layer not in adapter.updates:
            return None
        return adapter.updates[self.layer](inputs[0], y)


class Adapters(nn.Module):
    """All adapters on a trunk, which keeps it as `trunk.adapters`.

    Its children, by name, are those that belong to the trunk's own model: they are in its
    parameters and its state dict. An adapter of a model that only stands on this trunk belongs to
    that model.
    """

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.switch = Switch()
        self.named: dict[str, Adapter] = {}  # all of them; of one name, the latest
        self.frozen: list[nn.Parameter] = []  # what we froze, for `merge` to thaw
        self.hooks: list[RemovableHandle] = []
        for name, layer in linear_layers(trunk).items():
            self.hooks.append(layer.register_forward_hook(AddUpdate(self.switch, name)))

    def freeze(self, model: nn.Module) -> None:
        """Freeze all of a model that is neither an adapter nor a head to one number."""
        for name, p in model.named_parameters():
            if p.requires_grad and not name.startswith(("transformer.adapters.", "head.")):
                p.requires_grad_(False)
                self.frozen.append(p)

    def remove(self) -> None:
        """Take the hooks off the layers, and thaw what was frozen."""
        for hook in self.hooks:
            hook.remove()
        for p in self.frozen:
            p.requires_grad_(True)


class AdaptedTrunk(Trunk):
    """Another model's trunk, read through an adapter of our own (None: through none).

    Only the adapter belongs to this module, and so to its parameters and its state dict. The trunk
    belongs to the other model. While it reads for us, our adapter is on, and the trunk has dropout
    or not as we are in training mode or not. Afterwards it is as it was before.
    """

    def __init__(self, trunk: Trunk, adapter: Adapter | None):
        super().__init__()
        self.config = trunk.config
        self.adapter = adapter
        self.switch = Switch(adapter)
        # In a tuple, since PyTorch takes modules that are attributes for parts of this one.
        self.borrowed: tuple[Trunk, Any] = (trunk, trunk.adapters)

    @property
    def trunk(self) -> Any:
        """The trunk itself. ValueError if its adapters were merged, and it has other weights now.
        """
        trunk, adapters = self.borrowed
        if getattr(trunk, "adapters", None) is not adapters:
            raise ValueError(
                "the trunk that this model stands on has changed, since an adapter was merged into "
                "it: merge only when the models on the trunk are no longer needed"
            )
        return trunk

    @property
    def adapters(self) -> Adapters:
        """Those of the trunk."""
        return self.trunk.adapters

    @property
    def embedding(self) -> nn.Embedding:
        """The trunk's."""
        return self.trunk.embedding

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As the trunk's, with our adapter: (B, T) -> (B, T, C)."""
        trunk = self.trunk
        with switched(trunk.adapters.switch, self.switch.on), in_mode(trunk, self.training):
            return trunk(idx, attention_mask, cache)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """The trunk's."""
        return self.trunk.new_cache(batch_size, max_length)

    def replace(self, adapter: Adapter) -> int:
        """Take another adapter, under the same name. Returns how many numbers it has."""
        named = self.trunk.adapters.named
        name = next((n for n, a in named.items() if a is self.adapter), "default")
        named[name] = adapter
        self.adapter = adapter
        self.switch.on = adapter
        return count(adapter, name, self.trunk)

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """The frozen weights that we stand on, for a checkpoint to know them again."""
        for name, p in self.trunk.named_parameters():
            if not name.startswith("adapters."):
                yield p

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `.to(device)` calls: the trunk comes along."""
        self.trunk._apply(fn, recurse)
        return super()._apply(fn, recurse)


@contextlib.contextmanager
def switched(switch: Switch, adapter: Adapter | None) -> Iterator[None]:
    """Within, this adapter is on."""
    before = switch.on
    switch.on = adapter
    try:
        yield
    finally:
        switch.on = before


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Within, the module is in training mode or not."""
    if module.training == training:
        yield
        return
    module.train(training)
    try:
        yield
    finally:
        module.train(not training)


# --------------------------------------------------------------------------------------------------
# adding, switching, merging


def add(
    model: Pretrained,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    layers: Sequence[str] | None = None,
    name: str = "default",
) -> int:
    """Put a new adapter on a model and turn it on; the rest of the model is frozen.

    (Only the head of a reward or value model goes on learning.) Do it before a trainer is made.

    rank, alpha: r and α; ΔW is scaled by α/r. dropout: of the adapter's input. layers: the ends of
        the names of the layers to adapt, "q_proj" or "attn.c_proj" for instance; by default all
        linear layers of the blocks. name: of the adapter, since a model may have several.

    Returns how many numbers the adapter has. Raises ValueError for options out of range, a name
    that is taken, or a model that stands on another one's trunk.
    """
    trunk = own_trunk(model)
    adapter = Adapter(choose_layers(trunk, layers), *check_options(rank, alpha, dropout))
    return put_on(model, adapter, name)


def put_on(model: Pretrained, adapter: Adapter, name: str) -> int:
    """Make the adapter the model's own, turn it on, and freeze the rest: see `add`."""
    trunk = own_trunk(model)
    check_name(name, getattr(trunk, "adapters", None))
    adapters = prepare(trunk)
    adapters.freeze(model)
    adapters.requires_grad_(False)  # the adapters that the model has already
    adapters.add_module(name, adapter)
    adapters.named[name] = adapter
    adapters.switch.on = adapter
    adapters.train(trunk.training)
    return count(adapter, name, trunk)


def stand_on(
    model: Pretrained,
    name: str,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    layers: Sequence[str] | None = None,
) -> AdaptedTrunk:
    """The trunk of a model for another one to stand on, with an adapter of its own.

    If the model has an adapter on, the new one starts as its copy. With options it starts afresh,
    with those of the model's adapter for the options that are None, or `add`'s defaults.
    """
    trunk = trunk_of(model)
    check_name(name)
    start = adapter_on(model.transformer)
    given = {"rank": rank, "alpha": alpha, "dropout": dropout, "layers": layers}
    given = {option: value for option, value in given.items() if value is not None}
    if start is not None and not given:
        adapter = copy.deepcopy(start).requires_grad_(True)
    else:
        options: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "layers": None}
        if start is not None:
            options = {
                "rank": start.rank,
                "alpha": start.alpha,
                "dropout": start.dropout,
                "layers": list(start.updates),
            }
        options |= given
        chosen = choose_layers(trunk, options.pop("layers"))
        adapter = Adapter(chosen, *check_options(**options))
    adapters = prepare(trunk)
    if trunk is model.transformer:
        adapters.freeze(model)
    adapters.named[name] = adapter
    count(adapter, name, trunk)
    return AdaptedTrunk(trunk, adapter).train(model.training)


def snapshot(policy: nn.Module) -> nn.Module:
    """The policy as it is now, for good: the reference that it is compared with.

    It shares the frozen weights of a policy with adapters. Where the adapter is fresh, the policy
    is still its base, and the snapshot is the trunk with the adapter off; else it has a copy of the
    adapter, called `reference`. Of other policies it is a copy.
    """
    if not isinstance(policy, GPT) or not is_adapted(policy) or not has_frozen_base(policy):
        return copy.deepcopy(policy)
    adapter = adapter_on(policy.transformer)
    if adapter is not None and adapter.is_fresh():
        adapter = None
    trunk = trunk_of(policy)
    if adapter is not None:
        adapter = copy.deepcopy(adapter)
        trunk.adapters.named["reference"] = adapter
    reference = empty_model(GPT, policy.config)
    reference.transformer = AdaptedTrunk(trunk, adapter)
    reference.lm_head = policy.lm_head
    reference.special_tokens = dict(policy.special_tokens)
    return reference


@contextlib.contextmanager
def active(model: Pretrained, name: str) -> Iterator[None]:
    """`with active(model, name)`: within, the model has this adapter on, and no other.

    ValueError for a name that no adapter of its trunk has.
    """
    named = trunk_of(model).adapters.named if is_adapted(model) else {}
    if name not in named:
        raise ValueError(f"there is no adapter {name!r}; the model has {sorted(named)}")
    with switched(switch_of(model.transformer), named[name]):
        yield


@contextlib.contextmanager
def disabled(model: Pretrained) -> Iterator[None]:
    """`with disabled(model)`: within, the model has no adapter on, and is its base, bit for bit."""
    if not is_adapted(model):
        yield
        return
    with switched(switch_of(model.transformer), None):
        yield


@torch.no_grad()
def merge(model: Pretrained) -> None:
    """Add the adapter that is on to the weights, W + ΔW, and take all adapters off the model.

    Then it is an ordinary model again, and all of it is trained. Models that stand on its trunk
    cannot be used any more. ValueError for a model without adapters, or on another's trunk.
    """
    trunk = own_trunk(model)
    check_adapted(model)
    weights = merged_weights(trunk)
    for name, p in trunk.named_parameters():
        if name in weights:
            p.copy_(weights[name])
    trunk.adapters.switch.on = None
    trunk.adapters.remove()
    del trunk.adapters


@torch.no_grad()
def merged_copy(model: Any) -> Any:
    """A copy of a model, with the adapter that is on merged into its weights: an ordinary model."""
    weights = {f"transformer.{name}": x for name, x in merged_weights(model.transformer).items()}
    own = model.state_dict()
    weights |= {name: own[name] for name in own if not name.startswith("transformer.")}
    plain = empty_model(type(model), model.config)
    fill(plain, {name: x.clone() for name, x in weights.items()})
    plain.special_tokens = dict(model.special_tokens)
    return plain


@torch.no_grad()
def merged_weights(trunk: Any) -> dict[str, Tensor]:
    """The state dict of a trunk as if the adapter that is on had been merged into it."""
    base = trunk.trunk if isinstance(trunk, AdaptedTrunk) else trunk
    state = base.state_dict()
    state = {name: x for name, x in state.items() if not name.startswith("adapters.")}
    adapter = adapter_on(trunk)
    if adapter is not None:
        for layer, update in adapter.updates.items():
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = (weight + update.delta()).to(weight.dtype)
    return state


# --------------------------------------------------------------------------------------------------
# which trunk, which layers, and checks


def trunk_of(model: Any) -> Any:
    """The trunk that a model reads with: its own, or the one that it stands on."""
    trunk = getattr(model, "transformer", None)
    if not isinstance(trunk, Trunk):
        raise TypeError(
            f"adapters are for a GPT, a RewardModel or a ValueModel, not a {type(model).__name__}"
        )
    return trunk.trunk if isinstance(trunk, AdaptedTrunk) else trunk


def own_trunk(model: Any) -> Any:
    """The trunk of a model that has its own. ValueError if it stands on another's."""
    trunk = trunk_of(model)
    if trunk is not model.transformer:
        raise ValueError(
            "the model stands on another model's trunk, with one adapter of its own: copy it with "
            f"{type(model).__name__}.from_gpt(model), which merges the adapter, or change the "
            "other model"
        )
    return trunk


def switch_of(trunk: Any) -> Switch:
    """What says which adapter is on, in a trunk that has adapters or an AdaptedTrunk."""
    return trunk.switch if isinstance(trunk, AdaptedTrunk) else trunk.adapters.switch


def adapter_on(trunk: Any) -> Adapter | None:
    """The adapter that is on."""
    return switch_of(trunk).on if hasattr(trunk, "adapters") else None


def stands_on_another(model: Any) -> bool:
    """Whether a model stands on the trunk of another one."""
    return isinstance(getattr(model, "transformer", None), AdaptedTrunk)


def is_adapted(model: Any) -> bool:
    """Whether there are adapters on the trunk of a model."""
    return hasattr(trunk_of(model), "adapters")


def check_adapted(model: Any) -> Adapter:
    """The adapter that is on. ValueError if there is none."""
    adapter = adapter_on(model.transformer) if is_adapted(model) else None
    if adapter is None:
        raise ValueError("the model has no adapter on: lora.add(model) makes one")
    return adapter


def has_frozen_base(model: nn.Module) -> bool:
    """Whether nothing of a language model is trained but adapters."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return all(name.startswith("transformer.adapters.") for name in trained)


def prepare(trunk: Any) -> Adapters:
    """The trunk's adapters: none at first, with the hooks that they need."""
    if not hasattr(trunk, "adapters"):
        trunk.adapters = Adapters(trunk)
    return trunk.adapters


def linear_layers(trunk: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a trunk's blocks, by name."""
    return {name: m for name, m in trunk.named_modules() if isinstance(m, nn.Linear)}


def choose_layers(trunk: nn.Module, ends: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Those linear layers whose names end so; None: all. ValueError for an end that none has."""
    layers = linear_layers(trunk)
    if ends is None:
        return layers
    ends = [ends] if isinstance(ends, str) else ends
    if not isinstance(ends, (list, tuple, set)):
        raise TypeError(f"layers={ends!r} must be a list of names, or None for all layers")
    chosen: dict[str, nn.Linear] = {}
    for end in ends:
        matches = {name: m for name, m in layers.items() if f".{name}".endswith(f".{end}")}
        if not matches:
            known = sorted({last_part(name) for name in layers})
            raise ValueError(f"no layer's name ends with {end!r}; they end with {', '.join(known)}")
        chosen |= matches
    if not chosen:
        raise ValueError("layers is empty: name one or more, or pass None for all")
    return {name: m for name, m in layers.items() if name in chosen}  # in the trunk's order


def last_part(name: str) -> str:
    """`c_attn` of `h.0.attn.c_attn`."""
    return name.rpartition(".")[2]


def check_options(rank: Any, alpha: Any, dropout: Any) -> tuple[int, float, float]:
    """The options of an adapter as plain numbers. ValueError for one that is out of range."""
    options = CfgNode(rank=rank, alpha=alpha, dropout=dropout)
    check_numbers(options, "rank", low=1, whole=True)
    check_numbers(options, "alpha", low=1e-6)
    check_numbers(options, "dropout", high=0.999)
    return options.rank, options.alpha, options.dropout


def check_name(name: Any, adapters: Adapters | None = None) -> None:
    """ValueError for a name that no adapter can have, or that one of these has already."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"name={name!r} must be letters, digits and underscores")
    if adapters is not None and (name in adapters.named or hasattr(adapters, name)):
        raise ValueError(
            f"name={name!r} is taken; the adapters are {sorted(adapters.named)}: choose another"
        )


def count(adapter: Adapter, name: str, trunk: nn.Module) -> int:
    """How many numbers an adapter has, which is also logged."""
    trained = sum(p.numel() for p in adapter.parameters())
    total = sum(p.numel() for name, p in trunk.named_parameters() if "adapters." not in name)
    logger.info(
        "adapter %s: %s numbers in %d layers, %.2f%% of the trunk's %s",
        name,
        f"{trained:,}",
        len(adapter.updates),
        100 * trained / total,
        f"{total:,}",
    )
    return trained


# --------------------------------------------------------------------------------------------------
# files, in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors

# The kind of a model, by peft's names.
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
}

# Options of peft's that do not change what an adapter computes. All others do, or may do so in a
# later version: an adapter is refused if it has one of them, with any value but "no".
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",  # checked by itself
    "exclude_modules",
    "fan_in_fan_out",  # how the layers' matrices lie in the file of the base
    "inference_mode",
    "init_lora_weights",  # checked by itself
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",  # checked by itself
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",  # the names of the tensors tell which layers there are
    "task_type",
}

# Options that must have one of these values. Other ways to start A and B change the base as well.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# What all names of tensors begin with in peft's files.
PREFIX = "base_model.model."


def save_pretrained(model: Pretrained, folder: str | Path, base: str | None = None) -> None:
    """Save the adapter that is on, and the head of a reward or value model, for `peft` as well.

    Writes adapter_config.json and adapter_model.safetensors: both or, if the process is killed,
    neither. The base is not saved: the adapter needs the same one when it is loaded. With its name
    or path as `base`, `from_pretrained(folder)` finds it.
    """
    adapter = check_adapted(model)
    with write_together(folder) as new:
        options = to_json(peft_config(model, adapter, base), indent=2)
        write_text(new / "adapter_config.json", options + "\n")
        with atomic_write(new / "adapter_model.safetensors") as f:
            write_safetensors(f, tensors_by_peft_name(model, adapter))


def base_of(folder: str | Path) -> str:
    """The name or path of the model that an adapter stands on. ValueError if it names none."""
    file = Path(folder) / "adapter_config.json"
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{file} has base_model_name_or_path={name!r}, which names no base: load the base with "
            "from_pretrained, and then the adapter with lora.load(model, folder)"
        )
    if os.path.isfile(Path(name) / "adapter_config.json"):
        raise ValueError(f"{file} has base_model_name_or_path={name!r}, which is an adapter itself")
    return name


def load(model: Pretrained, folder: str | Path, name: str = "default") -> int:
    """Put the adapter from a folder on a model and turn it on, as `add` does. It can learn on.

    The folder is one that `save_pretrained` or `peft` wrote. The head of a reward or value model is
    read as well. In a model on another one's trunk, the adapter takes the place of the model's own.

    Returns how many numbers the adapter has. Raises ValueError for files that are damaged, that ask
    for what our adapters do not do, or that do not fit the model.
    """
    folder = Path(folder)
    rank, alpha, dropout = read_options(folder / "adapter_config.json")
    tensors = read_tensors(folder)
    # The layers are those that the tensors are called after.
    trunk = trunk_of(model)
    layers = {}
    for layer, module in linear_layers(trunk).items():
        name_of_a = f"{PREFIX}{name_in_files(model, f'transformer.{layer}')}.lora_A.weight"
        if name_of_a in tensors:
            layers[layer] = module
            if tensors[name_of_a].shape[:1] != (rank,):
                shape = tuple(tensors[name_of_a].shape)
                raise ValueError(f"{folder} has {name_of_a} of shape {shape}, and r={rank}")
    adapter = Adapter(layers, rank, alpha, dropout)
    copy_into(tensors_by_peft_name(model, adapter), tensors, folder)
    if trunk is model.transformer:
        return put_on(model, adapter, name)
    standing: Any = model.transformer
    return standing.replace(adapter)


def tensors_by_peft_name(model: Pretrained, adapter: Adapter) -> dict[str, Tensor]:
    """The parameters of an adapter on a model, and of the model's head to one number."""
    tensors: dict[str, Tensor] = {}
    for layer, update in adapter.updates.items():
        name = PREFIX + name_in_files(model, f"transformer.{layer}")
        tensors[f"{name}.lora_A.weight"] = update.A
        tensors[f"{name}.lora_B.weight"] = update.B
    for name, p in model.named_parameters():
        if name.startswith("head."):
            tensors[PREFIX + name_in_files(model, name)] = p
    return tensors


def name_in_files(model: Pretrained, name: str) -> str:
    """What transformers calls a parameter or a layer of ours."""
    family = FAMILIES[model.config.architecture]
    return family.stored(name, torch.empty(0), model.task)[0]


def peft_config(model: Pretrained, adapter: Adapter, base: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    # The head that peft trains beside the adapter.
    head = None
    if model.task != "CausalLM":
        head = [name_in_files(model, "head.weight").removesuffix(".weight")]
    return {
        "peft_type": "LORA",
        "task_type": TASKS[model.task],
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": target_modules(model, adapter),
        "modules_to_save": head,
        "bias": "none",
        # Whether the matrices of the layers are (in, out), as in transformers' GPT-2.
        "fan_in_fan_out": model.config.architecture == "gpt2",
    }


def target_modules(model: Pretrained, adapter: Adapter) -> list[str]:
    """An adapter's layers as peft names them: by their last parts, if these fit no other layer."""
    ends = sorted({last_part(layer) for layer in adapter.updates})
    if choose_layers(trunk_of(model), ends).keys() == adapter.updates.keys():
        return ends
    return [name_in_files(model, f"transformer.{layer}") for layer in adapter.updates]


def read_options(file: Path) -> tuple[int, float, float]:
    """(rank, alpha, dropout) of an adapter_config.json. ValueError for what we do not do."""
    options = read_json(file)
    for name, allowed in ALLOWED.items():
        value = options.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{file} has {name}={value!r}; ours can be {allowed}")
    for name, value in options.items():
        if name not in HARMLESS and value not in (None, False, "", [], {}):
            raise ValueError(f"{file} has {name}={value!r}, which our adapters do not do")
    # What peft takes where an option is missing.
    values = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} | options
    try:
        return check_options(values["r"], values["lora_alpha"], values["lora_dropout"])
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by peft's names."""
    files = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    for file in files:
        if os.path.isfile(file):
            return load_file(file)[0]
    raise ValueError(f"{folder} has no adapter: neither {files[0].name} nor {files[1].name}")


@torch.no_grad()
def copy_into(
    parameters: dict[str, Tensor],
    tensors: dict[str, Tensor],
    folder: Path,
) -> None:
    """Copy tensors of a file into parameters, by name. ValueError unless they are the same ones."""
    # transformers' heads of sequence classifiers have no bias.
    bias = f"{PREFIX}score.bias"
    if bias in parameters and f"{PREFIX}score.weight" in tensors:
        tensors = {bias: torch.zeros(1)} | tensors
    missing = sorted(parameters.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - parameters.keys())
    if missing or unexpected or not parameters:
        raise ValueError(
            f"{folder} has no adapter for this model: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}"
        )
    for name, p in parameters.items():
        tensor = tensors[name]
        if tensor.shape != p.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{folder} has {name} as {tensor.dtype} {tuple(tensor.shape)}; expected floats of "
                f"shape {tuple(p.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder} is damaged: {name} is not finite")
    for name, p in parameters.items():
        p.copy_(tensors[name])
