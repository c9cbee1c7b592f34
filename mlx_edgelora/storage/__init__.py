"""Atomic file writes, safetensors files, scratch files and activation stores."""
