"""A page about a run, drawn from its log alone."""
