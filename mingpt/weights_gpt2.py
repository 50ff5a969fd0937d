"""
GPT-2 as its files spell it: names of tensors, and options.

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

weights.py calls the functions here, and those of the same names in weights_llama.py.

Source: `transformers` for the names and config.json.
"""

import re
from typing import Any

import torch
from torch import Tensor

from mingpt.config import CfgNode
from mingpt.model_files import ModelFiles, check_fixed, check_sizes

ARCHITECTURE = "gpt2"  # our name for it

# What config.json calls the architecture.
MODEL_TYPES = ("gpt2",)

# The blocks' matrices, which transformers keeps in its class Conv1D as (in, out): the reverse of
# nn.Linear's. Embeddings and heads are the same everywhere.
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")

# Options of config.json that have another name here.
OURS = {
    "n_positions": "block_size",  # how many tokens the model can read at once
    "tie_word_embeddings": "tie_weights",  # whether the embedding is the head's matrix as well
}

# What a file may say of a GPT-2, by our names. (Its "n_inner" is always 4 n_embd here, as the
# tensors' shapes must show; ours of that name is a Llama's.)
OPTIONS = (
    "n_layer",
    "n_head",
    "n_embd",
    "vocab_size",
    "block_size",
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
    "tie_weights",
)

# Options of config.json that our GPT has no choice in, and their values here. Where an option is
# missing, transformers takes the first of these. Weights that were trained with any other value
# would load without an error, and then compute something else than what they learned.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),  # the architecture
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "layer_norm_epsilon": (1e-5,),  # added to the variance in every LayerNorm
    "scale_attn_weights": (True,),  # scores are divided by the square root of the head's size
    "scale_attn_by_inverse_layer_idx": (False,),  # ... and by the layer's number (Mistral's GPT-2s)
    "add_cross_attention": (False,),  # a decoder that also reads an encoder
    "quantization_config": (None,),  # weights of 8 bits or fewer
}


# --- in -------------------------------------------------------------------------------------------


def read_options(
    files: ModelFiles,
    presets: dict[str, tuple[int, int, int]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of a GPT-2 in these files, by our names: the caller's, and else the files'.

    The shapes of the tensors give the sizes, and what is written beside them gives the
    rest. In config.json, transformers and we put the options at the top, minGPT's scripts
    under "model"; nanoGPT and our trainers keep them as model_args. Raises ValueError where
    these contradict the shapes, and where nothing tells what must be known.
    """
    path, config_json, model_args = files.path, files.config_json, files.model_args
    # What the caller says of options that we have no choice in: which GELU a nanoGPT has.
    fixed = {name: options[name] for name in FIXED.keys() & options.keys()}
    options = {name: value for name, value in options.items() if name not in fixed}
    check_fixed(fixed, FIXED, "GPT-2", "from_pretrained")
    if "model_type" in config_json:  # without it, it is minGPT's, whose only architecture is GPT-2
        check_fixed(config_json, FIXED, "GPT-2", f"the config.json of {path}")
    sizes = read_sizes(files)
    min_gpt = config_json.get("model")
    of_file = {**sizes, "n_head": None, "tie_weights": is_tied(files.tensors, config_json)}
    preset = str(min_gpt.get("model_type")) if isinstance(min_gpt, dict) else ""
    if "model_type" in config_json:
        of_file["n_head"] = 12  # transformers' default
    elif preset in presets:
        of_file["n_head"] = presets[preset][1]
    if "dropout" in model_args:  # nanoGPT has one probability for all
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), model_args["dropout"])
        model_args = dropout | model_args
    for source in (config_json, min_gpt, model_args):
        if not isinstance(source, dict):
            continue
        for name, value in source.items():
            our_option = OURS.get(name, name)
            if our_option in OPTIONS and value is not None:  # minGPT's None: a preset decides
                of_file[our_option] = value
    check_sizes(of_file | options, sizes, path)
    check_activation(files, fixed)
    return of_file | options


def check_activation(files: ModelFiles, fixed: dict[str, Any]) -> None:
    """ValueError for a model of nanoGPT's of which nobody has said that it has GPT-2's GELU.

    Only nanoGPT has models without biases. Its model_args lack our names of the dropouts.
    """
    has_biases = any(is_bias(name) for name in files.tensors)
    has_its_options = files.model_args and "embd_pdrop" not in files.model_args
    is_nanogpt = not has_biases or has_its_options
    if is_nanogpt and "activation_function" not in fixed:
        raise ValueError(
            f"{files.path} is nanoGPT's, and does not tell which GELU its model has: the exact one "
            "(since 2023), or GPT-2's approximation, the only one here. Pass "
            "activation_function='gelu_new' to compute it with the latter; the logits of a model "
            "with the exact one then differ by about 0.002"
        )


def read_sizes(files: ModelFiles) -> dict[str, int]:
    """The sizes of a GPT-2, as the shapes of its tensors tell them."""
    path, tensors = files.path, files.tensors
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


def transposed(tensors: dict[str, Tensor], config: CfgNode) -> set[str]:
    """The names of those tensors that are (in, out), where our models have (out, in)."""
    # This matrix has C inputs and 3 C outputs: its shape tells which of the two all of them are.
    c_attn = tensors.get("transformer.h.0.attn.c_attn.weight")
    if c_attn is None or c_attn.shape[:1] != (config.n_embd,):
        return set()
    return {name for name in tensors if CONV1D.search(name) and tensors[name].dim() == 2}


def zero_biases(
    tensors: dict[str, Tensor],
    shapes: dict[str, torch.Size],
) -> dict[str, Tensor]:
    """Biases of zero for nanoGPT's bias=False, with which our model computes the same."""
    if any(is_bias(name) for name in tensors):
        return {}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if is_bias(name)}


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.endswith(".bias")


# --- out ------------------------------------------------------------------------------------------


def write_options(config: CfgNode, task: str) -> dict[str, Any]:
    """The config.json of a GPT-2 for a task, one of transformers' ("CausalLM"), by its names."""
    end_of_text = 50256 if config.vocab_size > 50256 else None  # its id in GPT-2's vocabulary
    return {
        "architectures": ["GPT2LMHeadModel" if task == "CausalLM" else f"GPT2For{task}"],
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


def stored(name: str, parameter: Tensor, task: str) -> tuple[str, Tensor]:
    """A parameter as transformers' file has it: (its name there, its numbers)."""
    if name.startswith("head."):
        head = "classifier" if task == "TokenClassification" else "score"
        return name.replace("head", head, 1), parameter
    return name, parameter.t() if CONV1D.search(name) else parameter
