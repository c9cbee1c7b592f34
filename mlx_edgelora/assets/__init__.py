"""The embedded model, its data and its default options."""
