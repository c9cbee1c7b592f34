"""The loop around the engine: optimizer, reports, files on disk."""
