"""Choose a plan for a memory budget: sizes, memory, time and search."""
