"""Compare a model with and without an adapter: losses, and answers to rows of the test set."""
