"""
Pretrained weights, in and out, in Hugging Face's formats.

Every model here has the two methods of `Pretrained`, `from_pretrained` and `save_pretrained`:

    GPT.from_pretrained("gpt2")        a name on the Hugging Face hub, "user/repo" as well
    GPT.from_pretrained("out/sft")     a folder that transformers or save_pretrained wrote
    GPT.from_pretrained("ckpt.pt")     one file: .safetensors, or a state dict of torch.save's

GPT-2 is one architecture, but its files come in many dialects. Who writes what:

    transformers    The blocks' matrices are (in, out), as in OpenAI's TensorFlow code. Names begin
                    with "transformer." (GPT2LMHeadModel) or lack it (GPT2Model). Until 2023 causal
                    masks were saved among the weights. A tied head may be left out.
    minGPT          The matrices are (out, in), as in nn.Linear. There are causal masks, and the
                    head is not tied. Its scripts write their options into a config.json.
    nanoGPT         A file is {"model": weights, "model_args": options}. If the model was compiled,
                    every name begins with "_orig_mod.". With bias=False it has no biases at all.
                    Since 2023 it has the exact GELU, before it had GPT-2's; the file does not say.
    this library    `save_pretrained` writes transformers' dialect. Checkpoints of the trainers are
                    (out, in), and names begin with what wraps the model: "module." or "policy.".
                    They hold "model_args" as nanoGPT's, and best.pt among its metadata.

The tables below name these differences. Then comes `Pretrained`, and after it the steps of
`from_pretrained` in their order: find the file, read its tensors under our names, read the
options, build the model and fill it.

Sources: `transformers` for the names and config.json; github.com/huggingface/safetensors
for the file format.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self
from urllib.parse import quote, urlsplit

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mingpt.checkpoint import (
    atomic_write,
    finish_write,
    read_json,
    read_torch,
    to_json,
    write_text,
    write_together,
)
from mingpt.config import CfgNode
from mingpt.download import NotFound, download, home

logger = logging.getLogger("mingpt")

# The names under which a folder or a repository keeps its weights; the first that exists is taken.
WEIGHT_FILES = (
    "model.safetensors",  # the usual one since 2023
    "model.safetensors.index.json",  # large models are cut into several files: this lists them
    "pytorch_model.bin",  # a state dict, saved with torch.save: the usual one until 2023
    "pytorch_model.bin.index.json",  # ... and the list of its pieces
)

# Whether files are mapped instead of read. Windows lets nobody replace a file that is mapped, and
# people save a model to where they loaded it from.
MAPS_FILES = os.name == "posix"

# What may stand before GPT-2's own names, once or several times.
PREFIXES = (
    "_orig_mod.",  # torch.compile
    "module.",  # DistributedDataParallel
    "policy.",  # ActorCritic, the policy and value function that PPOTrainer trains as one module
    "transformer.",  # GPT2LMHeadModel, minGPT, nanoGPT and our models; GPT2Model lacks it
)

# What stands in files of weights and is not read.
SKIPPED = (
    re.compile(r"\.attn\.bias$"),  # a causal mask (minGPT; transformers until 2023): we compute it
    re.compile(r"\.attn\.masked_bias$"),  # what masked scores were set to (transformers until 2023)
    re.compile(r"^value_model\."),  # the other half of an ActorCritic
)

# The blocks' matrices, which transformers keeps in its class Conv1D as (in, out): the reverse of
# nn.Linear's. Embeddings and heads are the same everywhere.
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")

# Options of config.json that have another name here.
OURS = {
    "n_positions": "block_size",  # how many tokens the model can read at once
    "tie_word_embeddings": "tie_weights",  # whether the embedding is the head's matrix as well
}

# Options of config.json that our GPT has no choice in, and their values here. Where an option is
# missing, transformers takes the first of these. Weights that were trained with any other value
# would load without an error, and then compute something else than what they learned.
GPT2_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),  # the architecture
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "layer_norm_epsilon": (1e-5,),  # added to the variance in every LayerNorm
    "scale_attn_weights": (True,),  # scores are divided by the square root of the head's size
    "scale_attn_by_inverse_layer_idx": (False,),  # ... and by the layer's number (Mistral's GPT-2s)
    "add_cross_attention": (False,),  # a decoder that also reads an encoder
}


# A file that names more blocks than this must have all their tensors before anything is built. It
# is twice as many as the largest GPT-2 has.
DEEP = 96

# How safetensors calls the types of parameters.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class Pretrained(nn.Module):
    """Gives a model `from_pretrained` and `save_pretrained`.

    A subclass is made from a config alone. It keeps that as `config`, its trunk as
    `transformer`, and either `lm_head` (a GPT) or `head` (a reward or value model).
    """

    presets: ClassVar[dict[str, tuple[int, int, int]]]  # {name: (n_layer, n_head, n_embd)}
    config: CfgNode

    @staticmethod
    def get_default_config() -> CfgNode:
        """All options of the model, with their defaults."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str = "main",
        **options: Any,
    ) -> Self:
        """The model in evaluation mode, in fp32, from the hub, a folder or a file.

        revision: a branch, tag or commit of the hub. options replace those of the model's
        config, dropout for instance. What a file does not tell must be passed: a bare state
        dict its n_head, and a file of nanoGPT's which GELU its model has, by transformers' name
        (activation_function="gelu_new" is GPT-2's, the only one here).

        Files of the hub are kept in $MINGPT_HOME, a folder for each revision. HF_ENDPOINT
        and HF_TOKEN are honoured. Safetensors in fp32 are not read but mapped into memory,
        which takes no time: the file must stay unchanged while the model lives. Training
        the model does not change the file, and `save_pretrained` may replace it.

        Raises ValueError for a name or path that does not exist, for files that are damaged
        or could run code, and for weights that do not fit their config.
        """
        # 1. Find the file: on this machine, or else on the hub.
        path = Path(name_or_path).expanduser()
        if not path.exists():
            path = hub_folder(str(name_or_path), revision)
        finish_write(path if path.is_dir() else path.parent)
        # 2. Read its tensors, under our names.
        tensors, model_args = read_tensors(weights_file(path))
        # 3. Read the options of the model; those of the caller come before those of the file.
        config = cls.get_default_config()
        fixed = {name: options.pop(name) for name in GPT2_ONLY.keys() & options.keys()}
        check_fixed(fixed, "from_pretrained")
        check_known(options, config)
        config.merge_from_dict(read_options(cls, path, tensors, model_args, options))
        check_activation(path, tensors, model_args, fixed)
        # 4. Build the model with empty parameters, and put the file's tensors in their place.
        try:
            if config.n_layer > DEEP:
                fit(cls, config, shapes_of_one_block(cls, config), tensors, path)
            model = empty_model(cls, config)
        except ValueError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from None
        # A tied head is the embedding, and counts once.
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        fill(model, fit(cls, config, shapes, tensors, path))
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into the folder.

        Both or, if the process is killed, none of them: then the older ones stay.
        A GPT's are those of a GPT2LMHeadModel, and transformers reads them. A reward or
        value model's have the same format, but only this library reads them back:
        transformers does not know the head, and would give the model a random one.
        """
        config = to_json(transformers_config(self), indent=2)
        with write_together(folder) as new:
            write_text(new / "config.json", config + "\n")
            with atomic_write(new / "model.safetensors") as f:
                write_safetensors(f, dict(self.named_parameters()))  # a tied head is in it once


def transformers_config(model: Pretrained) -> dict[str, Any]:
    """The config.json of a model, by transformers' names."""
    config = model.config
    architecture = "GPT2LMHeadModel" if hasattr(model, "lm_head") else type(model).__name__
    end_of_text = 50256 if config.vocab_size > 50256 else None  # its id in GPT-2's vocabulary
    return {
        "architectures": [architecture],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "embd_pdrop": config.embd_pdrop,
        "resid_pdrop": config.resid_pdrop,
        "attn_pdrop": config.attn_pdrop,
        "tie_word_embeddings": config.tie_weights,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end_of_text,  # GPT-2 begins and ends a text with the same token
        "eos_token_id": end_of_text,
    }


def write_safetensors(f: BinaryIO, parameters: dict[str, nn.Parameter]) -> None:
    """Write parameters to a file in the format of safetensors, in transformers' dialect.

    The length of a header (8 bytes), the header (JSON: where each tensor lies), the numbers. The
    package's own function would first put all of them side by side in memory, or else write to a
    file of its own choice, which only its owner may read.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for "format"
    end = 0
    for name, parameter in parameters.items():
        matrix = parameter.t() if CONV1D.search(name) else parameter
        offsets = [end, end + matrix.nbytes]
        dtype = SAFETENSORS_DTYPES.get(matrix.dtype)
        if dtype is None:
            raise TypeError(f"{name} is {matrix.dtype}; expected floats of 16 to 64 bits")
        header[name] = {"dtype": dtype, "shape": list(matrix.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    f.write(len(text).to_bytes(8, "little") + text)
    for name, parameter in parameters.items():
        matrix = parameter.t() if CONV1D.search(name) else parameter
        numbers = matrix.detach().cpu().contiguous().view(-1)
        f.write(numbers.view(torch.uint8).numpy().data)


# --- 1. Find the file ----------------------------------------------------------------------------


def hub_folder(name: str, revision: str) -> Path:
    """The local folder with a model of the hub, downloaded unless it is already there.

    Raises ValueError where the hub has no such model, or no weights of it that we read.
    """
    # The name becomes a part of a path on this machine: "../.." must not get through.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(
            f"got {name!r}; expected an existing file or folder, "
            "or a name on the hub, like 'gpt2' or 'user/repo'"
        )
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urlsplit(endpoint).netloc
    revision = quote(revision, safe="")  # "refs/pr/1" is one step of a path, not three
    url = f"{endpoint.rstrip('/')}/{name}/resolve/{revision}"
    folder = home() / "hub" / name.replace("/", "--") / revision
    headers = hub_headers()
    otherwise = (
        f"There is no file or folder {name!r} here. If you meant one, check its path; or download "
        "the model's files elsewhere, and pass the folder that holds them"
    )

    def fetch(file: str) -> Path:
        return download(f"{url}/{file}", folder / file, headers=headers, otherwise=otherwise)

    if not (folder / "config.json").exists():
        logger.info("%r is no file or folder here: asking %s for a model of that name", name, host)
    fetch("config.json")
    # The hub is asked for one name after the other, unless the cache shows which one it has.
    cached = tuple(file for file in WEIGHT_FILES if (folder / file).exists())
    candidates = cached if cached else WEIGHT_FILES
    for file in candidates:
        with contextlib.suppress(NotFound):  # the model has its weights under another name
            for shard in shards(fetch(file)):
                fetch(shard.name)
            return folder
    raise ValueError(f"{name!r} has no weights at {endpoint}: none of {', '.join(WEIGHT_FILES)}")


def hub_headers() -> dict[str, str]:
    """The user's token for the hub, as a header; {} without one. ValueError if it cannot be one."""
    token = os.environ.get("HF_TOKEN", "").strip()  # a file that it was read from ends its line
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("HF_TOKEN holds spaces or other signs that no token has: copy it again")
    return {"Authorization": f"Bearer {token}"}


def weights_file(path: Path) -> Path:
    """The file with the weights, or the index of such files: path itself, or one in this folder."""
    for file in (path, *(path / name for name in WEIGHT_FILES)):
        if file.is_file():
            return file
    raise ValueError(
        f"{path} contains no weights: none of {', '.join(WEIGHT_FILES)}. "
        "If they have another name, pass the path of that file"
    )


def shards(path: Path) -> list[Path]:
    """The files that an index lists, all in its folder; just [path] where path is not an index.

    An index is JSON: {"weight_map": {name of a tensor: name of its file}}. Raises
    ValueError where it names files elsewhere: one from the internet must not choose what is
    read on this machine.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    weight_map = read_json(path).get("weight_map")
    files = []
    if isinstance(weight_map, dict):
        files = sorted({str(file) for file in weight_map.values()})
    if not files or any(Path(file).name != file for file in files):
        raise ValueError(
            f"{path} has a weight_map with the files {files[:3]}; "
            "expected names of files in the same folder"
        )
    return [path.with_name(file) for file in files]


# --- 2. Read its tensors, under our names --------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({our name: tensor}, nanoGPT's model_args) from a file, or from all the files of an index.

    The PREFIXES are gone from the names, and what is SKIPPED is left out. The tensors keep
    the types and shapes that they have in the file.
    """
    tensors: dict[str, Tensor] = {}
    model_args: dict[str, Any] = {}
    for file in shards(path):
        in_file, model_args = load_file(file)
        for name, tensor in in_file.items():
            if any(pattern.search(name) for pattern in SKIPPED):
                continue
            if file.suffix != ".safetensors":
                # In a state dict tensors may be views of a larger one, or share their memory, as
                # a tied head does: from here on, each has its own.
                tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            tensors[our_name(name)] = tensor
    return tensors, model_args


def load_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({name: tensor}, nanoGPT's model_args) exactly as one file has them.

    torch.save writes pickles, which can contain any code. PyTorch's weights_only refuses
    all but tensors and plain data. Raises ValueError for that, and for everything else that
    goes wrong.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file that could be read")
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file), {}
        return load_state_dict(file)
    except Exception as error:  # damaged bytes can make the two readers raise anything
        first_line = str(error).split("\n")[0] or "it is empty"
        raise ValueError(
            f"{file} cannot be loaded: it is missing or damaged, or it contains more than tensors, "
            f"so that loading it could run foreign code ({first_line})"
        ) from None


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: the disk is read when a tensor is first used."""
    with safe_open(file, "pt") as f:
        names = f.keys()  # f is not a dict: a loop over f itself fails
        tensors = {name: f.get_tensor(name) for name in names}
    if not MAPS_FILES:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors


def load_state_dict(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of torch.save's, and nanoGPT's model_args where it has some."""
    state = read_torch(file, mmap=MAPS_FILES)
    # Our best.pt is a plain state dict. PyTorch keeps metadata beside its tensors, with a dict for
    # the model itself under "", and there `save_best` puts the options.
    metadata = getattr(state, "_metadata", {}).get("", {})
    model_args = state.get("model_args") or metadata.get("model_args")
    tensors = {str(name): tensor for name, tensor in state.get("model", state).items()}
    values = list(tensors.values())
    wrong = [name for name, tensor in tensors.items() if not is_dense(tensor)]
    if wrong:
        raise TypeError(f"{wrong[:3]} are not tensors, or not dense ones")
    # A tensor with a stride of 0 repeats its numbers, and many tensors may be views of the same
    # ones: a small file could fill the memory. (A tied head is a view, so some are all right.)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in values}
    large = [name for name, x in tensors.items() if x.nbytes > x.untyped_storage().nbytes()]
    wanted = sum(x.nbytes for x in values)
    if large or wanted > 4 * sum(storages.values()):
        raise TypeError(f"{large[:3] or 'the tensors'} are larger than what the file holds of them")
    return tensors, dict(model_args) if model_args else {}


def is_dense(value: Any) -> bool:
    """Whether value is an ordinary tensor with numbers in it: neither sparse nor on "meta"."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_meta


def our_name(name: str) -> str:
    """What our models call a parameter that any of the dialects calls `name`."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    if name.startswith(("lm_head.", "head.")):
        return name
    return f"transformer.{name}"


# --- 3. Read the options -------------------------------------------------------------------------


def check_known(options: dict[str, Any], config: CfgNode) -> None:
    """ValueError for options that the config of a model does not have."""
    unknown = sorted(options.keys() - vars(config).keys())
    if unknown:
        raise ValueError(f"a model has no options {unknown}; it has {', '.join(vars(config))}")


def read_options(
    cls: type[Pretrained],
    path: Path,
    tensors: dict[str, Tensor],
    model_args: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of the model at path, by our names: the caller's, and else those of the file.

    The shapes of the tensors give the sizes, and what is written beside them gives the
    rest. In config.json, transformers and we put the options at the top, minGPT's scripts
    under "model"; nanoGPT and our trainers keep them as model_args. Raises ValueError where
    these contradict the shapes, and where nothing tells what must be known.
    """
    sizes = read_sizes(tensors, path)
    config_json = read_config_json((path if path.is_dir() else path.parent) / "config.json")
    min_gpt = config_json.get("model")
    of_file = {**sizes, "n_head": None, "tie_weights": is_tied(tensors, config_json)}
    preset = str(min_gpt.get("model_type")) if isinstance(min_gpt, dict) else ""
    if "model_type" in config_json:
        of_file["n_head"] = 12  # transformers' default
    elif preset in cls.presets:
        of_file["n_head"] = cls.presets[preset][1]
    if "dropout" in model_args:  # nanoGPT has one probability for all
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), model_args["dropout"])
        model_args = dropout | model_args
    # "model_type" means something else here: it names one of our presets
    known = vars(cls.get_default_config()).keys() - {"model_type"}
    for source in (config_json, min_gpt, model_args):
        if not isinstance(source, dict):
            continue
        for name, value in source.items():
            our_option = OURS.get(name, name)
            if our_option in known and value is not None:  # minGPT's None: a preset decides
                of_file[our_option] = value
    options = of_file | options
    wrong = {name: options[name] for name in sizes if options[name] != sizes[name]}
    if wrong:
        raise ValueError(f"{path} has {wrong} in its config, but its tensors have {sizes}")
    if options["n_head"] is None:
        raise ValueError(
            f"{path} does not tell how many heads share its {sizes['n_embd']} channels: pass n_head"
        )
    return options


def check_activation(
    path: Path,
    tensors: dict[str, Tensor],
    model_args: dict[str, Any],
    fixed: dict[str, Any],
) -> None:
    """ValueError for a model of nanoGPT's of which nobody has said that it has GPT-2's GELU.

    Only nanoGPT has models without biases. Its model_args lack our names of the dropouts.
    """
    has_biases = any(is_bias(name) for name in tensors)
    is_nanogpt = not has_biases or (model_args and "embd_pdrop" not in model_args)
    if is_nanogpt and "activation_function" not in fixed:
        raise ValueError(
            f"{path} is nanoGPT's, and does not tell which GELU its model has: the exact one "
            "(since 2023), or GPT-2's approximation, the only one here. Pass "
            "activation_function='gelu_new' to compute it with the latter; the logits of a model "
            "with the exact one then differ by about 0.002"
        )


def read_config_json(file: Path) -> dict[str, Any]:
    """What config.json says; {} where there is none. ValueError where it is not a GPT-2's."""
    if not file.exists():
        return {}
    config = read_json(file)
    if "model_type" not in config:  # minGPT's, whose only architecture is GPT-2
        return config
    check_fixed(config, str(file))
    return config


def check_fixed(options: dict[str, Any], place: str) -> None:
    """ValueError for options that our GPT has no choice in, where they have another value."""
    for name, allowed in GPT2_ONLY.items():
        if options.get(name, allowed[0]) not in allowed:
            needed = " or ".join(map(repr, allowed))
            raise ValueError(f"{place} has {name}={options[name]!r}; our GPT-2 needs {needed}")


def read_sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, int]:
    """The sizes of a GPT-2, as the shapes of its tensors tell them."""
    wte = tensors.get("transformer.wte.weight")  # (V, C)
    wpe = tensors.get("transformer.wpe.weight")  # (block_size, C)
    if wte is None or wpe is None or wte.dim() != 2 or wpe.dim() != 2:
        raise ValueError(
            f"{path} is not a GPT-2, which has matrices wte.weight and wpe.weight; "
            f"it has {len(tensors)} tensors, the first of them {list(tensors)[:5]}"
        )
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    # Each block has six matrices and LayerNorms, or more.
    if not layers or len(tensors) < 6 * len(layers):
        raise ValueError(
            f"{path} names {len(layers)} blocks and holds only {len(tensors)} tensors: a block of "
            "GPT-2 has at least six"
        )
    return {
        "vocab_size": wte.size(0),
        "block_size": wpe.size(0),
        "n_layer": len(layers),
        "n_embd": wte.size(1),
    }


def is_tied(tensors: dict[str, Tensor], config_json: dict[str, Any]) -> bool:
    """Whether the embedding serves as the head's matrix, unless the options say otherwise."""
    if "lm_head.weight" not in tensors:
        return True
    if "model_type" in config_json:  # transformers' default, which its config.json may leave out
        return True
    return torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])


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


def shapes_of_one_block(cls: type[Pretrained], config: CfgNode) -> dict[str, torch.Size]:
    """{name: shape} of the parameters of a model of this config, told by one of its blocks.

    All blocks are alike. To build the thousands that a hostile file may name takes seconds.
    """
    one_block = CfgNode(**(config.to_dict() | {"n_layer": 1}))
    shapes = {}
    for name, parameter in empty_model(cls, one_block).named_parameters():
        if name.startswith("transformer.h.0."):
            for i in range(config.n_layer):
                shapes[name.replace(".0.", f".{i}.", 1)] = parameter.shape
        else:
            shapes[name] = parameter.shape
    return shapes


def fit(
    cls: type[Pretrained],
    config: CfgNode,
    shapes: dict[str, torch.Size],
    tensors: dict[str, Tensor],
    path: Path,
) -> dict[str, Tensor]:
    """The tensor of every parameter of a model of this config, (out, in) and in fp32.

    shapes: of its parameters. A matrix that must be transposed for that becomes a view: its
    memory stays as it is in the file. Raises ValueError where names, shapes or types do not fit
    the model.
    """
    if config.tie_weights:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    if not any(is_bias(name) for name in tensors):
        # nanoGPT's bias=False. With biases of zero, our model computes the same.
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if is_bias(name)}
        tensors = tensors | zeros
    check_names(cls, tensors, shapes, path)
    # This matrix has C inputs and 3 C outputs: its shape tells which of the two all of them are.
    c_attn = tensors["transformer.h.0.attn.c_attn.weight"]
    in_out = c_attn.shape[:1] == (config.n_embd,)
    fitted = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if in_out and CONV1D.search(name):
            tensor = tensor.t()
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path} has {name} as {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected floats of shape {tuple(shape)}"
            )
        fitted[name] = tensor.float()
    return fitted


def fill(model: Pretrained, fitted: dict[str, Tensor]) -> None:
    """Make the tensors the parameters of the model, without copying them."""
    # assign: the tensors themselves become the parameters. Not strict: a tied head has no tensor.
    model.load_state_dict(fitted, strict=False, assign=True)
    if hasattr(model, "lm_head") and model.config.tie_weights:
        head = model.get_submodule("lm_head")
        head.weight = model.get_parameter("transformer.wte.weight")


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.endswith(".bias")


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
    raise ValueError(
        f"{path} does not fit a {cls.__name__} with its config; "
        f"missing {missing[:5]}, unexpected {unexpected[:5]}{hint}"
    )
