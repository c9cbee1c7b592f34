"""Export adapters to files for other programs, one tensor at a time."""
