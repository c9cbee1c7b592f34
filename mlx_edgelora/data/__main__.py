"""`python -m mlx_edgelora.data`, the same as `mlx-edgelora data`."""

import sys

from mlx_edgelora.preview.command import main

if __name__ == "__main__":
    sys.exit(main())
