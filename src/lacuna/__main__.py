"""`python -m lacuna`, for torchrun."""

from lacuna.cli.main import main

main()
