"""The commands: one file a group; each imports its subject only when it is run."""
