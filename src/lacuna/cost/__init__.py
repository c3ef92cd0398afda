"""What a run will take, before it runs: memory, time, tokens, disk. Only trace.py imports torch."""
