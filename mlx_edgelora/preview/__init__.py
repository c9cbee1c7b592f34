"""The command that previews the data of a run."""
