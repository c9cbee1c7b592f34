"""An array that a graph can use before its values are known.

The gradient of the loss with respect to the last hidden state is known only after the forward and
the head, but autodiff needs it when the graph is built. MLX reads an array from a safetensors file
when the array is evaluated. So the graph gets an array of a file, and the values are written into
the file later. The file is unlinked and stays in the system's cache; it has the size of one hidden
state, and no other file is read while a GPU waits.
"""

import json
import math
import os
import struct
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.device_memory import to_numpy
from mlx_edgelora.storage.safetensors import NAMES
from mlx_edgelora.storage.temporaries import scratch_file


class DeferredArray:
    """A lazy array whose values are set later.

    Args:
        shape, dtype: shape and dtype of the array.

    Attributes:
        array: the lazy array; evaluating it before `fill` is an error.

    Raises:
        EdgeLoraError: no file can be created in the system's temporary folder.
    """

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype) -> None:
        self._shape, self._dtype = tuple(shape), dtype
        size = math.prod(shape) * dtype.size
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
        text = json.dumps({"x": entry}).encode()
        header = struct.pack("<Q", len(text)) + text
        self._start = len(header)
        try:
            with scratch_file(Path(tempfile.gettempdir())) as (file, path):
                file.write(header)
                os.truncate(file.fileno(), len(header) + size)  # MLX checks the size
                self.array = mx.load(os.fspath(path), format="safetensors")["x"]
                os.truncate(file.fileno(), len(header))  # so that reading too early fails
                self._file = file
        except OSError as error:
            raise _cannot_write(error) from error
        weakref.finalize(self, self._file.close)  # in case a step fails before `fill`

    def fill(self, value: mx.array) -> None:
        """Set the values of the array, once.

        Raises:
            ValueError: the shape or dtype differs from that of the array.
        """
        if (value.shape, value.dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"got {value.dtype} {value.shape}, expected {self._dtype} {self._shape}"
            )
        mx.eval(value)
        data, done = memoryview(to_numpy(value).reshape(-1).view("uint8")), 0
        try:
            with self._file as file:  # MLX has it open as well
                while done < len(data):
                    done += os.pwrite(file.fileno(), data[done:], self._start + done)
        except OSError as error:
            raise _cannot_write(error) from error


def _cannot_write(error: OSError) -> EdgeLoraError:
    return EdgeLoraError(
        f"{tempfile.gettempdir()}: cannot be written ({error.strerror}); free some space there, "
        "name another folder in TMPDIR, or keep no activations with --activations spill"
    )
