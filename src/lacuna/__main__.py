"""`python -m lacuna`, for torchrun."""

from lacuna.cli import main

main()
