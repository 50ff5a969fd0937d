"""
The Llama family as Hugging Face's files spell it: names of tensors, and options.

The names of the tensors are ours after the first step ("model." there, "transformer." here), and
the matrices lie as in nn.Linear. What differs is config.json: each model of the family is its own
architecture for transformers, although all are one trunk with other options.

    llama      Llama, SmolLM2, and most that were trained after its example
    mistral    with a window of attention (sliding_window; null means none)
    qwen2      with biases for queries, keys and values
    qwen3      with norms of queries and keys, and a size of its heads that is not C / n_head

weights.py calls the functions here, and those of the same names in weights_gpt2.py.

Source: `transformers` for the names, config.json and the defaults of what it leaves out.
"""

import re
from typing import Any

import torch
from torch import Tensor

from mingpt.config import CfgNode, check_numbers
from mingpt.model_files import ModelFiles, check_fixed, check_sizes

ARCHITECTURE = "llama"  # our name for it

# What config.json calls the architecture, and transformers' classes begin with.
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Options of config.json that have another name here.
OURS = {
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "head_dim": "head_size",
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_weights",
    "attention_dropout": "attn_pdrop",
    "embd_pdrop": "embd_pdrop",  # transformers has no such dropout: only we write it
    "resid_pdrop": "resid_pdrop",
}

# What transformers takes where an option is missing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 32, "max_position_embeddings": 2048},
    "mistral": {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_hidden_layers": 32,
    },
    "qwen3": {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_hidden_layers": 32,
    },
}

# Options of config.json that our trunk has no choice in, and their values here. Where an option is
# missing, transformers takes the first of these. Weights that were trained with any other value
# would load without an error, and then compute something else than what they learned.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of z · sigmoid(z)
    "mlp_bias": (False,),  # biases in the MLP
    "partial_rotary_factor": (1.0, 1),  # the part of a head's channels that turn
    "num_experts": (None, 0, 1),  # mixtures of experts
    "num_local_experts": (None, 0, 1),
    "add_cross_attention": (False,),  # a decoder that also reads an encoder
    "quantization_config": (None,),  # weights of 8 bits or fewer
}

# What a file of weights alone, without a config, does not tell.
UNTOLD = ("n_head", "block_size", "rope_theta", "norm_eps")


# --- in -------------------------------------------------------------------------------------------


def read_options(
    files: ModelFiles,
    presets: dict[str, tuple[int, int, int]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of a Llama in these files, by our names: the caller's, and else the files'.

    Raises ValueError where the files contradict the shapes of the tensors or ask for what our trunk
    does not do, and where nothing tells what must be known. (The presets are of minGPT's GPTs.)
    """
    path = files.path
    sizes = read_sizes(files)
    of_file: dict[str, Any] = {"n_head": None, **sizes}
    if files.config_json.get("model_type") is not None:
        of_file |= read_config_json(files.config_json, f"the config.json of {path}")
    of_file |= {name: value for name, value in files.model_args.items() if value is not None}
    of_file |= options
    if "tie_weights" not in of_file:
        of_file["tie_weights"] = is_tied(files.tensors)
    missing = [name for name in UNTOLD if of_file.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} holds the weights of a Llama and does not tell its options: pass {missing}"
        )
    check_sizes(of_file, sizes, path)
    check_heads(of_file, files)
    return of_file


def read_config_json(config_json: dict[str, Any], place: str) -> dict[str, Any]:
    """The options of a config.json of transformers', by our names. place: what errors name."""
    check_fixed(config_json, FIXED, "Llama", place)
    model_type = config_json["model_type"]
    values = DEFAULTS[model_type] | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    no_dropout = {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    values |= no_dropout | config_json
    options = {ours: values[theirs] for theirs, ours in OURS.items() if theirs in values}
    options = {name: value for name, value in options.items() if value is not None}
    options |= read_rope(values, place)
    # Llama and Qwen3 have biases for all four matrices of attention, or for none.
    has_biases = values.get("attention_bias", False) and model_type in ("llama", "qwen3")
    options["attention_bias"] = has_biases or model_type == "qwen2"
    options["output_bias"] = has_biases
    options["query_key_norm"] = model_type == "qwen3"
    options["sliding_window"] = read_window(values, place)
    return options


def read_rope(values: dict[str, Any], place: str) -> dict[str, Any]:
    """rope_theta and rope_scaling, which transformers keeps together since 2025."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{place} has {rope!r} for rotary positions; expected a JSON object")
    turning = {"partial_rotary_factor": FIXED["partial_rotary_factor"]}
    check_fixed(rope, turning, "Llama", place)
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return {"rope_theta": theta, "rope_scaling": None if is_plain else scaling}


def read_window(values: dict[str, Any], place: str) -> int | None:
    """The window of attention, the same in all layers; None if there is none."""
    model_type = values["model_type"]
    is_qwen = model_type in ("qwen2", "qwen3")
    if model_type == "llama" or (is_qwen and not values.get("use_sliding_window", False)):
        return None
    kinds = layer_kinds(values, place)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return values["sliding_window"]
    raise ValueError(
        f"{place} has layers of the kinds {sorted(kinds)}; in our trunk all layers see as far: "
        "only full_attention, or only sliding_attention"
    )


def layer_kinds(values: dict[str, Any], place: str) -> set[str]:
    """The kinds of attention of a model that has a window: full_attention, sliding_attention."""
    kinds = values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"{place} has layer_types={kinds!r:.60}; expected a list of names")
        return set(kinds)
    if values["model_type"] == "mistral":
        return {"sliding_attention"}
    # In a Qwen, the first max_window_layers see everything.
    check_numbers(CfgNode(**values), "max_window_layers", "num_hidden_layers", whole=True)
    if values["max_window_layers"] == 0:
        return {"sliding_attention"}
    if values["max_window_layers"] >= values["num_hidden_layers"]:
        return {"full_attention"}
    return {"full_attention", "sliding_attention"}


def read_sizes(files: ModelFiles) -> dict[str, int]:
    """The sizes of a Llama, as the shapes of its tensors tell them."""
    path, tensors = files.path, files.tensors
    embedding = tensors.get("transformer.embed_tokens.weight")  # (V, C)
    gate = tensors.get("transformer.layers.0.mlp.gate_proj.weight")  # (n_inner, C)
    if embedding is None or gate is None or embedding.dim() != 2 or gate.dim() != 2:
        raise ValueError(
            f"{path} is not a Llama, which has matrices embed_tokens.weight and "
            f"layers.0.mlp.gate_proj.weight; it has {len(tensors)} tensors, the first of them "
            f"{list(tensors)[:5]}"
        )
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.layers.")}
    # Each layer has seven matrices and two norms, or more.
    if len(tensors) < 9 * len(layers):
        raise ValueError(
            f"{path} names {len(layers)} layers and holds only {len(tensors)} tensors: a layer of "
            "a Llama has at least nine"
        )
    return {
        "vocab_size": embedding.size(0),
        "n_layer": len(layers),
        "n_embd": embedding.size(1),
        "n_inner": gate.size(0),
    }


def check_heads(options: dict[str, Any], files: ModelFiles) -> None:
    """ValueError for more heads, or larger ones, than there are rows in the queries' matrix.

    With the numbers of a hostile file, no model could be built to compare with.
    """
    q_proj = files.tensors.get("transformer.layers.0.self_attn.q_proj.weight")
    rows = q_proj.shape[0] if q_proj is not None and q_proj.dim() > 0 else 0
    for name in ("n_head", "n_kv_head", "head_size"):
        value = options.get(name)
        if isinstance(value, (int, float)) and value > rows:
            raise ValueError(f"{files.path} has {name}={value}, and its queries have {rows} rows")


def is_tied(tensors: dict[str, Tensor]) -> bool:
    """Whether the embedding serves as the head's matrix, where no option tells it."""
    head = tensors.get("lm_head.weight")
    return head is None or torch.equal(head, tensors["transformer.embed_tokens.weight"])


def transposed(tensors: dict[str, Tensor], config: CfgNode) -> set[str]:
    """The names of those tensors that are (in, out), where our models have (out, in): none."""
    return set()


def zero_biases(
    tensors: dict[str, Tensor],
    shapes: dict[str, torch.Size],
) -> dict[str, Tensor]:
    """Biases that a file may leave out: none."""
    return {}


# --- out ------------------------------------------------------------------------------------------


def write_options(config: CfgNode, task: str) -> dict[str, Any]:
    """The config.json of a Llama for a task, one of transformers' ("CausalLM"), by its names."""
    model_type = model_type_of(config)
    theirs = {theirs: getattr(config, ours) for theirs, ours in OURS.items()}
    window: dict[str, Any] = {}
    if model_type in ("qwen2", "qwen3"):
        slides = config.sliding_window is not None
        kind = "sliding_attention" if slides else "full_attention"
        window = {
            "use_sliding_window": slides,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0 if slides else config.n_layer,
            "layer_types": [kind] * config.n_layer,
        }
    elif model_type == "mistral":
        window = {"sliding_window": config.sliding_window}
    return {
        "architectures": [f"{MODEL_TYPES[model_type]}For{task}"],
        "model_type": model_type,
        **theirs,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias and model_type != "qwen2",
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        **window,
        "bos_token_id": None,  # if they are missing, transformers takes those of the first Llama
        "eos_token_id": None,
    }


def model_type_of(config: CfgNode) -> str:
    """What transformers calls the architecture with these options."""
    if config.query_key_norm:
        return "qwen3"
    if config.attention_bias and not config.output_bias:
        return "qwen2"
    if config.sliding_window is not None:
        return "mistral"
    return "llama"


def stored(name: str, parameter: Tensor, task: str) -> tuple[str, Tensor]:
    """A parameter as transformers' file has it: (its name there, its numbers)."""
    name = re.sub(r"^head\.", "score.", name)
    return re.sub(r"^transformer\.", "model.", name), parameter
