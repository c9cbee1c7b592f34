"""Measure memory and bytes read and written, and format them as text."""
