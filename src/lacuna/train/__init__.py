"""Our own loop for pretraining and SFT."""
