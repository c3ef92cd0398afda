"""What a run is: strict, frozen models of plain data. Nothing here imports torch."""
