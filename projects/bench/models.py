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
