"""What is known before a run: plan, data preview, dry run, doctor."""
