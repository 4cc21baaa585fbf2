"""What a person or a program is told about sweeps, runs and nodes."""
