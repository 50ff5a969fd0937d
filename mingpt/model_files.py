"""
What a model is kept in: the two containers of weights, and what is read of them.

Weights are kept in safetensors, or in what torch.save writes. Both hold named tensors. Nothing that
is read here can run code, however it is made: a safetensors file has nothing but numbers and a
header in JSON, and of torch.save's pickles PyTorch reads tensors and plain data only.

Source: github.com/huggingface/safetensors for its format.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from mingpt.checkpoint import read_torch

# Whether files are mapped instead of read. Windows lets nobody replace a file that is mapped, and
# people save a model to where they loaded it from.
MAPS_FILES = os.name == "posix"

# How safetensors calls the types of parameters.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass
class ModelFiles:
    """What the files of a model hold, before a model is built from them."""

    # What the user named: a folder, or a file. Errors name it.
    path: Path
    # The tensors by our names. They have the types and shapes of the file, and where files can be
    # mapped, they take no memory before they are used.
    tensors: dict[str, Tensor]
    # What config.json says; {} where there is none.
    config_json: dict[str, Any] = field(default_factory=dict)
    # The options that stand in the file of weights itself, by our names: nanoGPT's "model_args",
    # which our trainers keep as well, and the header of a .gguf file.
    model_args: dict[str, Any] = field(default_factory=dict)
    # Of tensors in safetensors files, by our names: (the file, the name in it).
    origins: dict[str, tuple[Path, str]] = field(default_factory=dict)
    # What is read of a .gguf file only when it is asked for; `tensors` has placeholders on "meta".
    unread: Mapping[str, Tensor] = field(default_factory=dict)

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, by ours, in the given type, and in memory or mapped."""
        tensor = self.tensors[name]
        if tensor.is_meta:
            return self.unread[name].to(dtype)
        if tensor.dtype == dtype or name not in self.origins:
            return tensor.to(dtype)
        # What has been read of a mapped file stays in memory until nothing maps the file any more.
        # A mapping for each tensor keeps that to one tensor.
        file, name_in_file = self.origins[name]
        with safe_open(file, "pt") as f:
            return f.get_tensor(name_in_file).to(dtype)


def check_fixed(
    options: dict[str, Any],
    fixed: dict[str, tuple[Any, ...]],
    model: str,
    place: str,
) -> None:
    """ValueError for options that our model has no choice in, where they have another value."""
    for name, allowed in fixed.items():
        if options.get(name, allowed[0]) not in allowed:
            needed = " or ".join(map(repr, allowed))
            raise ValueError(f"{place} has {name}={options[name]!r}; our {model} needs {needed}")


def check_sizes(options: dict[str, Any], sizes: dict[str, int], path: Path) -> None:
    """ValueError where the options contradict the sizes of the tensors, or lack the heads."""
    wrong = {name: options[name] for name in sizes if options[name] != sizes[name]}
    if wrong:
        raise ValueError(f"{path} has {wrong} in its config, but its tensors have {sizes}")
    if options["n_head"] is None:
        raise ValueError(
            f"{path} does not tell how many heads share its {sizes['n_embd']} channels: pass n_head"
        )


def load_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({name: tensor}, nanoGPT's model_args) exactly as one file has them.

    torch.save writes pickles, which can contain any code. PyTorch's weights_only refuses
    all but tensors and plain data. Raises ValueError for that, and for everything else that
    goes wrong.
    """
    if not os.path.isfile(file):
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


def write_safetensors(f: BinaryIO, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file in the format of safetensors. TypeError for other types than floats.

    The length of a header (8 bytes), the header (JSON: where each tensor lies), the numbers. The
    package's own function would first put all of them side by side in memory, or else write to a
    file of its own choice, which only its owner may read.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for "format"
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise TypeError(f"{name} is {tensor.dtype}; expected floats of 16 to 64 bits")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    f.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        numbers = tensor.detach().cpu().contiguous().view(-1)
        f.write(numbers.view(torch.uint8).numpy().data)
