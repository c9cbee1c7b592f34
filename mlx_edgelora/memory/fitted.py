"""Fitted."""

FITTED: dict[str, dict[str, float]] = {}
