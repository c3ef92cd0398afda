"""The machine: what it is and what it can do. Nothing here imports torch at import."""
