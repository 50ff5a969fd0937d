"""
Pretrained weights, in and out, in Hugging Face's formats: `from_pretrained` and `save_pretrained` of every model here.

    GPT.from_pretrained("gpt2")             a name on the hub, "user/repo" too
    GPT.from_pretrained("out/sft")          a folder with config.json and weights, as transformers and save_pretrained write it
    GPT.from_pretrained("ckpt.pt")          a file: .safetensors, or a state dict of PyTorch's, minGPT's and nanoGPT's included

GPT-2's weights come in many dialects. The blocks' matrices may be (in, out), as TensorFlow and transformers have them, or (out, in),
as in nn.Linear; names may lack `transformer.`; causal masks may lie between the weights; the head may be the embedding.
Sources: `transformers` for config.json and the names, github.com/huggingface/safetensors for the format of the files.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from urllib.parse import quote
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mingpt.checkpoint import atomic_write, write_text
from mingpt.download import download, home, NotFound

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # the matrices that transformers stores as (in, out)
SKIPPED = re.compile(r"\.attn\.(masked_)?bias$|^value_model\.")  # causal masks (GPT computes its own), and the other half of PPO
PREFIXES = re.compile(r"^(_orig_mod\.|module\.|policy\.|transformer\.)+")  # of torch.compile, DDP, PPOTrainer; of the trunk
OURS = {"n_positions": "block_size", "tie_word_embeddings": "tie_weights"}  # what config.json calls otherwise; and what must not be otherwise:
GPT2_ONLY = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}


class Pretrained:
    """Gives a model `from_pretrained` and `save_pretrained`; it has a config, a trunk named `transformer`, and a head."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str = "main", **options):
        """The model in evaluation mode, from the hub, a folder or a file; options replace those of its config.

        Hub files are kept in $MINGPT_HOME (one folder a revision: branch, tag or commit); HF_ENDPOINT and HF_TOKEN are honoured. A
        bare state dict does not tell its number of heads: pass n_head if its sizes are no preset's. Safetensors in fp32 are mapped, not
        read, the blocks' matrices transposed as they lie there: neither training nor `save_pretrained` writes into that file, and
        nobody should while the model lives. ValueError for what is not there, damaged, would run code, or does not fit.
        """
        path = Path(name_or_path).expanduser()
        path = path if path.exists() else hub_folder(str(name_or_path), revision)
        tensors, extra = open_tensors(weights_file(path))
        config = cls.get_default_config()
        if unknown := options.keys() - vars(config).keys():
            raise ValueError(f"a model has no options {sorted(unknown)}; it has {', '.join(vars(config))}")
        config.merge_from_dict(read_config(cls, path, tensors, extra) | options)
        if config.n_head is None:
            raise ValueError(f"{path} does not tell the number of heads that share its {config.n_embd} channels: pass n_head")
        with torch.device("meta"), NoInit():  # no time and no memory for random weights
            model = cls(config).eval()
        if tied := hasattr(model, "lm_head") and config.tie_weights:
            tensors.pop("lm_head.weight", None)
        model.load_state_dict(fitting(tensors, model, path), strict=False, assign=True)
        if tied:
            model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write folder/model.safetensors and config.json; a GPT's are those of transformers' GPT2LMHeadModel."""
        C = self.config
        tensors = {name: (p.t() if CONV1D.search(name) else p).contiguous() for name, p in self.named_parameters()}
        config = {"architectures": ["GPT2LMHeadModel" if hasattr(self, "lm_head") else type(self).__name__], "model_type": "gpt2",
                  "n_layer": C.n_layer, "n_head": C.n_head, "n_embd": C.n_embd, "n_positions": C.block_size,
                  "vocab_size": C.vocab_size, "embd_pdrop": C.embd_pdrop, "resid_pdrop": C.resid_pdrop, "attn_pdrop": C.attn_pdrop,
                  "tie_word_embeddings": C.tie_weights, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                  **dict.fromkeys(("bos_token_id", "eos_token_id"), 50256 if C.vocab_size > 50256 else None)}  # GPT-2's
        with atomic_write(Path(folder) / "model.safetensors") as f:
            save_file(tensors, f.name, metadata={"format": "pt"})
        write_text(Path(folder) / "config.json", json.dumps(config, indent=2, default=lambda number: number.item()) + "\n")


def hub_folder(name: str, revision: str) -> Path:
    """The local folder of a model on the hub, downloaded unless it is there already. ValueError if there is no such model."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"{name!r} is neither a file or folder here nor a name on the hub, like 'gpt2' or 'user/repo'")
    endpoint, revision = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", quote(revision, safe="")
    folder, base = home() / "hub" / name.replace("/", "--") / revision, f"{endpoint.rstrip('/')}/{name}/resolve/{revision}"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    fetch = lambda file: download(f"{base}/{file}", folder / file, headers=headers)
    fetch("config.json")
    for file in [f for f in FILES if (folder / f).exists()] or FILES:
        with contextlib.suppress(NotFound):  # then it is one of the other three
            for shard in shards(fetch(file)):
                fetch(shard.name)
            return folder
    raise ValueError(f"{name!r} has no weights at {endpoint}: none of {', '.join(FILES)}")


def weights_file(path: Path) -> Path:
    """The file with the weights, or the index of such files: path itself, or the first of FILES in it."""
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    raise ValueError(f"{path} holds no weights: none of {', '.join(FILES)}. For another file, give its own name")


def shards(path: Path) -> list[Path]:
    """The files that an index lists, all beside it; just [path] if path is no index."""
    index = read_json(path).get("weight_map") if path.name.endswith(".index.json") else {"all": path.name}
    files = sorted({str(file) for file in index.values()}) if isinstance(index, dict) else []
    if files and all(Path(file).name == file for file in files):
        return [path.with_name(file) for file in files]
    raise ValueError(f"{path}: weight_map must name files in the same folder, not {files[:3]}")


class NoInit(TorchFunctionMode):
    """Leaves out what torch.nn.init does: the weights will come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **kwargs or {})


def open_tensors(path: Path) -> tuple[dict, dict]:
    """({name: tensor}, nanoGPT's model_args), with the wrappers' prefixes and the mask buffers gone; safetensors are only mapped."""
    tensors, extra = {}, {}
    for file in shards(path):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as f:
                    tensors |= {name: f.get_tensor(name) for name in f.keys()}
            else:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))  # before 2020, no zip
                extra = dict(state.get("model_args") or {})
                state = {str(name): tensor for name, tensor in state.get("model", state).items()}
                if odd := [name for name, t in state.items() if not torch.is_tensor(t) or t.layout != torch.strided or t.is_meta]:
                    raise TypeError(f"{odd[:3]} are no tensors, or not dense ones")
                tensors |= state
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{file} is no file of weights that can be loaded: missing, damaged, or more than tensors, so that "
                             f"loading it could run foreign code ({str(error).partition(chr(10))[0]})") from None
    tensors = {PREFIXES.sub("", name): tensor for name, tensor in tensors.items() if not SKIPPED.search(name)}
    if file.suffix != ".safetensors":  # of a state dict some may be views, or share their memory
        tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return {n if n.startswith(("lm_head.", "head.")) else f"transformer.{n}": tensor for n, tensor in tensors.items()}, extra


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_config(cls: type[Pretrained], path: Path, tensors: dict, extra: dict) -> dict:
    """The options of the model: from config.json where there is one, else from the shapes of its tensors."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    said = read_json(file) if file.exists() else {}
    for name, allowed in GPT2_ONLY.items() if "model_type" in said else ():
        if said.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{file} has {name}={said[name]!r}: no GPT-2, which has {' or '.join(map(repr, allowed))}")
    try:
        (vocab_size, n_embd), (block_size, _) = tensors["transformer.wte.weight"].shape, tensors["transformer.wpe.weight"].shape
    except (KeyError, ValueError, AttributeError):
        raise ValueError(f"{path} holds no GPT-2, which has matrices wte.weight and wpe.weight, but {list(tensors)[:5]}") from None
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    sizes = {"vocab_size": vocab_size, "block_size": block_size, "n_layer": n_layer, "n_embd": n_embd}
    head, embedding = tensors.get("lm_head.weight"), tensors["transformer.wte.weight"]
    heads = {(layers, width): heads for layers, heads, width in cls.presets.values()}
    config = {**sizes, "n_head": heads.get((n_layer, n_embd)),
              "tie_weights": head is None or "model_type" in said or torch.equal(head, embedding)}
    known = vars(cls.get_default_config()).keys() - {"model_type"}
    for source in (said, said.get("model"), extra):  # minGPT's scripts nest the model's options
        if isinstance(source, dict):
            config |= {OURS.get(k, k): v for k, v in source.items() if OURS.get(k, k) in known and v is not None}
    if wrong := {name: config[name] for name in sizes if config[name] != sizes[name]}:
        raise ValueError(f"{path} says {wrong} of itself, but its tensors are those of {sizes}")
    return config


def fitting(tensors: dict, model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensor of every parameter, in fp32, as it lies in the file. ValueError where names, shapes or types do not fit."""
    parameters = dict(model.named_parameters())  # a tied head is no parameter of its own
    if not any(name.endswith(".bias") for name in tensors):  # nanoGPT's bias=False
        tensors = tensors | {name: torch.zeros(p.shape) for name, p in parameters.items() if name.endswith(".bias")}
    if parameters.keys() != tensors.keys():
        lacks, has = [sorted(a - b)[:5] for a, b in ((parameters.keys(), tensors.keys()), (tensors.keys(), parameters.keys()))]
        way = "; use from_gpt(GPT.from_pretrained(...))" if "head.weight" in lacks else ""
        raise ValueError(f"{path} is no {type(model).__name__} of its config: it lacks {lacks}, and has {has} besides{way}")
    found, transposed = {}, tensors["transformer.h.0.attn.c_attn.weight"].shape[:1] == (model.config.n_embd,)
    for name, p in parameters.items():
        tensor = tensors[name].t() if transposed and CONV1D.search(name) else tensors[name]
        if tensor.shape != p.shape or not tensor.is_floating_point():
            raise ValueError(f"{path} has {name} as {tensor.dtype} {tuple(tensor.shape)}, must be float {tuple(p.shape)}")
        found[name] = tensor.float()
    return found
