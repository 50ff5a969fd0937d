"""
Pretrained weights, in and out, in Hugging Face's formats.

Every model here has the two methods of `Pretrained`, `from_pretrained` and `save_pretrained`:

    GPT.from_pretrained("gpt2")        a name on the Hugging Face hub, "user/repo" as well
    GPT.from_pretrained("smollm2")     a small chat model that pip brings
    GPT.from_pretrained("out/sft")     a folder that transformers or save_pretrained wrote, or one
                                       with an adapter (lora.py) that names its base
    GPT.from_pretrained("ckpt.pt")     one file: .safetensors, .gguf, or what torch.save wrote

Both families of models, GPT-2 and Llama, are read and written. What their files call things stands
in a table and a few functions for each: weights_gpt2.py and weights_llama.py. What is the same
for both stands here: the steps of `from_pretrained` in their order. Find the files (hub.py), read
their tensors under our names (model_files.py), read the options, build the model and fill it.

The three kinds of models are saved as the classes that transformers has for them:

    GPT            ...LMHeadModel or ...ForCausalLM
    RewardModel    ...ForSequenceClassification with one label. Its head has no bias there. Ours is
                   kept as "head_bias" in config.json, where transformers does not look: its scores
                   are ours less this constant.
    ValueModel     ...ForTokenClassification with one label
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mingpt import gguf, weights_gpt2, weights_llama
from mingpt.checkpoint import atomic_write, read_json, to_json, write_text, write_together
from mingpt.config import CfgNode
from mingpt.hub import find_pretrained, shards, weights_file
from mingpt.model_files import ModelFiles, load_file, write_safetensors

__all__ = ["Pretrained", "find_pretrained"]

# How the files of each architecture spell it.
FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family for family in (weights_gpt2, weights_llama)
}

# What may stand before the names of the trunk's own parameters, once or several times.
PREFIXES = (
    "_orig_mod.",  # torch.compile
    "module.",  # DistributedDataParallel
    "policy.",  # ActorCritic, the policy and value function that PPOTrainer trains as one module
    "transformer.",  # our models, GPT2LMHeadModel, minGPT, nanoGPT; GPT2Model lacks it
    "model.",  # LlamaForCausalLM; LlamaModel lacks it
)

# What the head to one number is called: by us, and by transformers' classes.
HEADS = ("head.", "score.", "classifier.")

# What stands in files of weights and is not read.
SKIPPED = (
    re.compile(r"\.attn\.bias$"),  # a causal mask (minGPT; transformers until 2023): we compute it
    re.compile(r"\.attn\.masked_bias$"),  # what masked scores were set to (transformers until 2023)
    re.compile(r"\.rotary_emb\.inv_freq$"),  # rotary frequencies (transformers until 2023)
    re.compile(r"^value_model\."),  # the other half of an ActorCritic
)

# The ids with a meaning, by transformers' names.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# A file that names more blocks than this must have all their tensors before anything is built.
# Hardly any model has as many.
DEEP = 96


class Pretrained(nn.Module):
    """Gives a model `from_pretrained` and `save_pretrained`.

    A subclass is made from a config alone. It keeps that as `config`, its trunk as
    `transformer`, and either `lm_head` (a GPT) or `head` (a reward or value model).
    """

    presets: ClassVar[dict[str, tuple[int, int, int]]]  # {name: (n_layer, n_head, n_embd)}
    task: ClassVar[str] = "CausalLM"  # the end of the name of transformers' class
    config: CfgNode

    def __init__(self, config: CfgNode) -> None:
        super().__init__()
        self.config = config
        # The tokens with which a text begins and ends, as the files of a pretrained model tell
        # them, by transformers' names: {"eos_token_id": 50256}. See `stop_tokens`.
        self.special_tokens: dict[str, Any] = {}

    @property
    def stop_tokens(self) -> list[int]:
        """The tokens that end the texts of a pretrained model, for `generate(stop_token=...)`.

        They are read from its generation_config.json, or else its config.json, and saved with it.
        A model that was not loaded has none.
        """
        ids = self.special_tokens.get("eos_token_id", [])
        return list(ids) if isinstance(ids, list) else [ids]

    @staticmethod
    def get_default_config() -> CfgNode:
        """All options of the model, with their defaults."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str = "main",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """The model in evaluation mode, from the hub, a folder or a file.

        revision: a branch, tag or commit of the hub. dtype: of the parameters, torch.bfloat16 for
        instance; whatever type the files have is converted. options replace those of the model's
        config, dropout for instance. What a file does not tell must be passed: a bare state
        dict its n_head, and a file of nanoGPT's which GELU its model has, by transformers' name
        (activation_function="gelu_new" is GPT-2's, the only one here).

        Files of the hub are kept in $MINGPT_HOME, a folder for each revision. HF_ENDPOINT
        and HF_TOKEN are honoured. Safetensors in the wanted dtype are not read but mapped into
        memory, which takes no time: the file must stay unchanged while the model lives. Training
        the model does not change the file, and `save_pretrained` may replace it. Others are
        converted tensor by tensor.

        Raises ValueError for a name or path that does not exist, for files that are damaged
        or could run code, and for weights that do not fit their config.
        """
        check_dtype(dtype)
        adapter = Path(name_or_path) / "adapter_config.json"
        if os.path.isfile(adapter):  # Path.is_file raises for a name that is too long
            return on_its_base(cls, name_or_path, revision=revision, dtype=dtype, **options)
        # 1. Find the files: on this machine, or else on the hub.
        path = find_pretrained(name_or_path, revision)
        # 2. Read their tensors, under our names.
        files = read_files(path)
        # 3. Read the options of the model; those of the caller come before those of the files.
        config = cls.get_default_config()
        family = family_of(files)
        check_known(options, config, family)
        config.architecture = family.ARCHITECTURE
        config.merge_from_dict(family.read_options(files, cls.presets, options))
        # 4. Build the model with empty parameters, and put the files' tensors in their place.
        model = model_for(cls, config, files)
        # A tied head is the embedding, and counts once.
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        fit(cls, config, shapes, files)
        fill(model, load_all(files, config, shapes, dtype))
        model.special_tokens = read_special_tokens(path, files.config_json, config.vocab_size)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into the folder, for `transformers` as well.

        With a language model whose `special_tokens` are known, also generation_config.json. All
        of them or, if the process is killed, none: then the older ones stay.

        ValueError for a model with adapters (lora.py).
        """
        has_adapters = any("transformer.adapters." in name for name, _ in self.named_parameters())
        if has_adapters or hasattr(self.transformer, "borrowed"):
            raise ValueError(
                "the model has adapters, which these files cannot hold: lora.merge(model) first, "
                "or save the adapter with lora.save_pretrained(model, folder)"
            )
        family = FAMILIES[self.config.architecture]
        tensors = {}
        for name, parameter in self.named_parameters():  # a tied head is among them once
            if name == "head.bias" and self.task == "SequenceClassification":
                continue  # it goes into config.json
            name_in_file, tensor = family.stored(name, parameter, self.task)
            tensors[name_in_file] = tensor
        generates = self.special_tokens and self.task == "CausalLM"
        with write_together(folder) as new:
            write_text(new / "config.json", to_json(config_json(self), indent=2) + "\n")
            if generates:
                tokens = to_json(saved_tokens(self), indent=2)
                write_text(new / "generation_config.json", tokens + "\n")
            with atomic_write(new / "model.safetensors") as f:
                write_safetensors(f, tensors)
        if not generates:  # then it is of the model that was here before
            (Path(folder) / "generation_config.json").unlink(missing_ok=True)


def on_its_base(cls: type[Pretrained], folder: str | Path, **options: Any) -> Any:
    """The model that an adapter stands on, which the adapter's files name, with the adapter on."""
    from mingpt import lora  # it imports this file

    model = cls.from_pretrained(lora.base_of(folder), **options)
    lora.load(model, folder)
    return model.eval()


def config_json(model: Pretrained) -> dict[str, Any]:
    """The config.json of a model, by transformers' names."""
    options = FAMILIES[model.config.architecture].write_options(model.config, model.task)
    options |= saved_tokens(model)
    if model.task == "CausalLM":
        return options
    options |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one number
    if model.task == "SequenceClassification":
        options["head_bias"] = model.get_parameter("head.bias").item()
    return options


def saved_tokens(model: Pretrained) -> dict[str, Any]:
    """The special tokens that go into a model's files.

    A sequence classifier of transformers' reads the last token that is no padding. If the end of a
    text counted as padding, it would read the token before it: then no pad_token_id is saved.
    """
    tokens = dict(model.special_tokens)
    if tokens.get("pad_token_id") in model.stop_tokens:
        del tokens["pad_token_id"]
    return tokens


# --- 2. Read the files, under our names -----------------------------------------------------------


def read_files(path: Path) -> ModelFiles:
    """What the files of a folder, or one file, hold of a model.

    The PREFIXES are gone from the names, and what is SKIPPED is left out.
    """
    if path.suffix == ".gguf":
        return read_gguf(path)
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    files = ModelFiles(path, {}, read_json(config_file) if config_file.exists() else {})
    for file in shards(weights_file(path)):
        in_file, files.model_args = load_file(file)
        for name, tensor in in_file.items():
            if any(pattern.search(name) for pattern in SKIPPED):
                continue
            if file.suffix == ".safetensors":
                files.origins[our_name(name)] = (file, name)
            else:
                # In a state dict tensors may be views of a larger one, or share their memory, as
                # a tied head does: from here on, each has its own.
                tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            files.tensors[our_name(name)] = tensor
    add_head_bias(files)
    return files


def read_gguf(path: Path) -> ModelFiles:
    """What a file of llama.cpp's holds: its options and tensors."""
    options, tensors, vocabulary, _ = gguf.read(path)
    names = {name: vocabulary.get(name) for name in SPECIAL_TOKENS}
    names["pad_token_id"] = vocabulary.get("padding_token_id")
    placeholders = {name: torch.empty(tensors.shape(name), device="meta") for name in tensors}
    return ModelFiles(path, placeholders, names, options, unread=tensors)


def our_name(name: str) -> str:
    """What our models call a parameter that any of the files calls `name`."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    if name.startswith(HEADS):
        return "head." + name.partition(".")[2]
    if name.startswith("lm_head."):
        return name
    return f"transformer.{name}"


def add_head_bias(files: ModelFiles) -> None:
    """Give the head of a sequence classifier its bias: the one in config.json, else zero.

    Those of transformers, and so trl's reward models, have none.
    """
    architectures = str(files.config_json.get("architectures"))
    if "ForSequenceClassification" not in architectures or "head.bias" in files.tensors:
        return
    bias = files.config_json.get("head_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise ValueError(f"the config.json of {files.path} has head_bias={bias!r}, not a number")
    files.tensors["head.bias"] = torch.tensor([bias], dtype=torch.float32)


# --- 3. Read the options --------------------------------------------------------------------------


def family_of(files: ModelFiles) -> ModuleType:
    """How the files spell their model. ValueError for an architecture that we do not have.

    config.json names the architecture. Where it does not (minGPT's), or is missing, the names of
    the tensors tell it.
    """
    model_type = files.config_json.get("model_type")
    if model_type is None:
        is_llama = "transformer.embed_tokens.weight" in files.tensors
        return weights_llama if is_llama else weights_gpt2
    for family in FAMILIES.values():
        if isinstance(model_type, str) and model_type in family.MODEL_TYPES:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.MODEL_TYPES)
    raise ValueError(
        f"the config.json of {files.path} has model_type={model_type!r}; ours are {known}"
    )


def check_known(options: dict[str, Any], config: CfgNode, family: ModuleType) -> None:
    """ValueError for options that a model does not have, and for another architecture."""
    unknown = sorted(options.keys() - vars(config).keys() - family.FIXED.keys())
    if unknown:
        raise ValueError(f"a model has no options {unknown}; it has {', '.join(vars(config))}")
    asked = options.get("architecture", family.ARCHITECTURE)
    if asked != family.ARCHITECTURE:
        raise ValueError(
            f"architecture={asked!r} was asked for, and the files have {family.ARCHITECTURE!r}: "
            "leave it out"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError for a type that is none for parameters."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a type of floats, such as torch.bfloat16")


def read_special_tokens(path: Path, config_json: dict[str, Any], size: int) -> dict[str, Any]:
    """The special tokens that generation_config.json or config.json names; size: the vocabulary's.

    The former comes first: a chat model's often ends a turn with more tokens than config.json has.
    Ids outside the vocabulary are left out, since some files write -1 for none.
    """
    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    generation = read_json(file) if path.suffix != ".gguf" and file.exists() else {}
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = generation.get(name)
        value = config_json.get(name) if value is None else value
        ids = value if isinstance(value, list) else [value]
        ids = [i for i in ids if type(i) is int and 0 <= i < size]
        if ids and name == "eos_token_id":
            tokens[name] = ids if isinstance(value, list) else ids[0]
        elif ids:
            tokens[name] = ids[0]
    return tokens


# --- 4. Build the model and fill it --------------------------------------------------------------


class NoInit(TorchFunctionMode):
    """Within `with NoInit():`, the functions of torch.nn.init do nothing.

    Random weights take most of the time of building a model, and here the file's replace
    them. It also leaves the random generator as it was.
    """

    def __torch_function__(  # PyTorch calls this in the place of each of its functions
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(cls: type[Pretrained], config: CfgNode) -> Any:
    """A model in evaluation mode whose parameters have no memory yet."""
    with torch.device("meta"), NoInit():
        return cls(config).eval()


def model_for(cls: type[Pretrained], config: CfgNode, files: ModelFiles) -> Any:
    """The `empty_model` that the files are to fill. ValueError for a config that cannot be."""
    try:
        if config.n_layer > DEEP:
            fit(cls, config, shapes_of_one_block(cls, config), files)
        return empty_model(cls, config)
    except ValueError as error:
        raise ValueError(f"{files.path} cannot be loaded: {error}") from None


def shapes_of_one_block(cls: type[Pretrained], config: CfgNode) -> dict[str, torch.Size]:
    """{name: shape} of the parameters of a model of this config, told by one of its blocks.

    All blocks are alike. To build the thousands that a hostile file may name takes seconds.
    """
    one_block = CfgNode()
    one_block.merge_from_dict(config.to_dict() | {"n_layer": 1})
    shapes = {}
    for name, parameter in empty_model(cls, one_block).named_parameters():
        if re.match(r"transformer\.\w+\.0\.", name):
            for i in range(config.n_layer):
                shapes[name.replace(".0.", f".{i}.", 1)] = parameter.shape
        else:
            shapes[name] = parameter.shape
    return shapes


def fit(
    cls: type[Pretrained],
    config: CfgNode,
    shapes: dict[str, torch.Size],
    files: ModelFiles,
) -> None:
    """ValueError unless the files have what a model of this config needs, and nothing more.

    shapes: of the model's parameters. Biases that the files may leave out become tensors of zeros,
    and a tied head is left out.
    """
    if config.tie_weights:
        files.tensors.pop("lm_head.weight", None)
    family = FAMILIES[config.architecture]
    files.tensors |= family.zero_biases(files.tensors, shapes)
    check_names(cls, files.tensors, shapes, files.path)
    turned = family.transposed(files.tensors, config)
    for name, shape in shapes.items():
        tensor = files.tensors[name]
        in_our_order = tensor.t() if name in turned else tensor
        if in_our_order.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{files.path} has {name} as {tensor.dtype} {tuple(in_our_order.shape)}; "
                f"expected floats of shape {tuple(shape)}"
            )


def load_all(
    files: ModelFiles,
    config: CfgNode,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensor of every parameter, (out, in) and of the given type; the files' are used up.

    A matrix that must be transposed becomes a view: its memory stays as it is in the file.
    """
    turned = FAMILIES[config.architecture].transposed(files.tensors, config)
    loaded = {}
    for name in shapes:
        tensor = files.load(name, dtype)
        loaded[name] = tensor.t() if name in turned else tensor
        # If it was converted, the original's memory is free for the next one.
        del files.tensors[name]
    return loaded


def fill(model: Any, loaded: dict[str, Tensor]) -> None:
    """Make the tensors the parameters of the model, without copying them."""
    # assign: the tensors themselves become the parameters. Not strict: a tied head has no tensor.
    model.load_state_dict(loaded, strict=False, assign=True)
    if hasattr(model, "lm_head") and model.config.tie_weights:
        model.lm_head.weight = model.transformer.embedding.weight


def check_names(
    cls: type[Pretrained],
    tensors: dict[str, Tensor],
    shapes: dict[str, torch.Size],
    path: Path,
) -> None:
    """ValueError unless there is a tensor for every parameter, and no other."""
    missing = sorted(shapes.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - shapes.keys())
    if not missing and not unexpected:
        return
    hint = ""
    if "head.weight" in missing:  # a language model was loaded as a reward or value model
        hint = ": to put a new head on its trunk, use from_gpt(GPT.from_pretrained(...))"
    differences = []
    if missing:
        differences.append(f"missing {missing[:5]}")
    if unexpected:
        differences.append(f"unexpected {unexpected[:5]}")
    raise ValueError(
        f"{path} does not fit a {cls.__name__} with its config; {', '.join(differences)}{hint}"
    )
