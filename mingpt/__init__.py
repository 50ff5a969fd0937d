"""minRLHF: from bytes to a preference-tuned language model, in a few files that can be read in an afternoon."""

__version__ = "0.1.0"
