"""minRLHF: from bytes to a preference-tuned language model, in files that read in an afternoon."""

__version__ = "0.1.0"
