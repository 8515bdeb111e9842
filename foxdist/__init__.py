"""foxdist: long-context, context-parallel training of the Forgetting Transformer."""

__version__ = "0.1.0"
