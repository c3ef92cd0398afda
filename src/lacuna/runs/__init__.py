"""The run folder, where the stages meet. Nothing here imports torch."""
