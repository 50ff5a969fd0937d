"""What several test files need: small models and temporary folders."""

import tempfile
import unittest
from pathlib import Path

import torch

from mingpt.model import GPT
from mingpt.utils import set_seed


def tiny_gpt(seed=0, **options):
    """A GPT of a few thousand parameters without dropout, its weights large enough for its logits to differ."""
    set_seed(seed)
    config = GPT.get_default_config()
    config.merge_from_dict({"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "block_size": 12,
                            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, **options})
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


class TempDirTestCase(unittest.TestCase):
    """Gives each test a folder of its own, self.folder."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
