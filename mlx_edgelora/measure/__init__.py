"""What a run takes: memory and bytes read and written."""
