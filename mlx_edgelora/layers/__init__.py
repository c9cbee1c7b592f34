"""Layers with exact gradients of their own; each can be used alone."""
