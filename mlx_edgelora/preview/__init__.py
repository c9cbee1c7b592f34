"""The command that shows data as a run will see it."""
