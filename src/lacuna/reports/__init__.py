"""From an experiment's run folders to an answer that a researcher may believe."""
