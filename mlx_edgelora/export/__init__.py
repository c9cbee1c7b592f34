"""From an adapter to files that other programs use; adapter and model are read tensor by tensor."""
