"""One experiment file in, one complete config for each run out. Nothing here imports torch."""
