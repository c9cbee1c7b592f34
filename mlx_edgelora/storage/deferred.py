"""An array that a graph can be built on before its values are known.

The gradient of a loss with respect to the last hidden state is known only when these are
computed and the head has been read; autodiff wants it when the graph is built. MLX reads an
array from a safetensors file when it is evaluated, not before: so the graph gets an array of
a file, and the file its values later. It has no name, and stays in the system's cache: of all
files only this one, a hidden state at most, is read while a GPU waits.
"""

import json
import math
import os
import struct
import tempfile
import weakref
from collections.abc import Sequence

import mlx.core as mx

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.safetensors import NAMES, to_numpy


class DeferredArray:
    """An array whose values come later.

    Args:
        shape, dtype: of the array.

    Attributes:
        array: lazy; its evaluation before `keep` is an error.

    Raises:
        EdgeLoraError: the system's temporary folder takes no file.
    """

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype) -> None:
        self._shape, self._dtype = tuple(shape), dtype
        size = math.prod(shape) * dtype.size
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
        text = json.dumps({"x": entry}).encode()
        header = struct.pack("<Q", len(text)) + text
        self._start = len(header)
        try:
            with tempfile.NamedTemporaryFile(prefix="mlx_edgelora-", buffering=0) as file:
                file.write(header)
                os.truncate(file.fileno(), len(header) + size)  # MLX looks at its size
                self.array = mx.load(file.name, format="safetensors")["x"]
                os.truncate(file.fileno(), len(header))  # whoever reads too early finds nothing
                self._file = os.fdopen(os.dup(file.fileno()), "wb", buffering=0)
        except OSError as error:
            raise _cannot_write(error) from error
        weakref.finalize(self, self._file.close)  # of a step that failed before `keep`

    def fill(self, value: mx.array) -> None:
        """Give the array its values, once.

        Raises:
            ValueError: they have another shape or dtype than was promised.
        """
        if (value.shape, value.dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"got {value.dtype} {value.shape}, promised were {self._dtype} {self._shape}"
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
