"""lacuna: one experiment file in, trained, resumable, comparable language models out."""

__version__ = "0.1.0"
