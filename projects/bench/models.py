"""
The models of both sides: a GPT with random weights, as this library and as transformers build it.
"""

from mingpt.model import GPT
from mingpt.utils import import_extra

# vocab_size and block_size of the presets that are measured.
SIZES = {"gpt2": (50257, 1024), "gpt-micro": (128, 64), "gpt-mini": (128, 64)}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}


def our_gpt(preset: str) -> GPT:
    """A preset with random weights and without dropout."""
    vocab_size, block_size = SIZES[preset]
    config = GPT.get_default_config()
    config.merge_from_dict(
        {
            "model_type": preset,
            "vocab_size": vocab_size,
            "block_size": block_size,
            **NO_DROPOUT,
        }
    )
    return GPT(config)


def their_config(preset: str, pad_token_id: int = 0, **options):
    """The config of the same model in transformers, and further options of theirs."""
    transformers = import_extra("transformers", "bench")
    config = our_gpt(preset).config
    return transformers.GPT2Config(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=pad_token_id,
        **NO_DROPOUT,
        **options,
    )


def their_gpt(preset: str, pad_token_id: int = 0):
    """The same model in transformers."""
    config = their_config(preset, pad_token_id)
    return import_extra("transformers", "bench").GPT2LMHeadModel(config)


# The shape of SmolLM2-135M, by our names.
SMOLLM2 = {
    "architecture": "llama",
    "n_layer": 30,
    "n_head": 9,
    "n_kv_head": 3,
    "n_embd": 576,
    "n_inner": 1536,
    "vocab_size": 49152,
    "block_size": 8192,
    "rope_theta": 100000.0,
}


def our_smollm2() -> GPT:
    """A model of SmolLM2's shape with random weights."""
    config = GPT.get_default_config()
    config.merge_from_dict({**SMOLLM2, **NO_DROPOUT})
    return GPT(config)


def their_smollm2():
    """The same model in transformers."""
    transformers = import_extra("transformers", "bench")
    config = transformers.LlamaConfig(
        num_hidden_layers=SMOLLM2["n_layer"],
        num_attention_heads=SMOLLM2["n_head"],
        num_key_value_heads=SMOLLM2["n_kv_head"],
        hidden_size=SMOLLM2["n_embd"],
        intermediate_size=SMOLLM2["n_inner"],
        vocab_size=SMOLLM2["vocab_size"],
        max_position_embeddings=SMOLLM2["block_size"],
        rope_theta=SMOLLM2["rope_theta"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)
