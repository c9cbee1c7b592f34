"""From a budget to a plan: sizes, cost, time, search."""
