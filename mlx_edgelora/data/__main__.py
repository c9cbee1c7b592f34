"""`python -m mlx_edgelora.data`, which is `mlx-edgelora data`."""

import sys

from mlx_edgelora.preview.command import main

if __name__ == "__main__":
    sys.exit(main())
