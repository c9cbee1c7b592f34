"""The report page of a run, made from its log alone."""
