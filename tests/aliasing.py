"""Stand-ins for a backend that uses mapped memory in place, as Metal does."""

import mlx.core as mx
import numpy as np

from mlx_edgelora.storage.device_memory import to_numpy
from mlx_edgelora.storage.stores import MappedStore


class Aliases:
    """`mx.asarray` whose arrays see what is written to the mapping later.

    They have memory of their own, which every write of a store is repeated in.

    Args:
        patch: a MonkeyPatch, for as long as these are to be seen.
        takes: whether a region of so many bytes is wrapped.

    Attributes:
        sizes: bytes of what was wrapped, by call.
    """

    def __init__(self, patch, takes=lambda nbytes: True):
        self.sizes, self._takes, self._made = [], takes, []
        write = MappedStore._write

        def seen(store, slot, source):
            write(store, slot, source)
            start, size = store._place(slot)
            region = store._file.pages[start : start + size]
            for original, memory in self._made:
                if np.may_share_memory(original, region):
                    memory[...] = original

        patch.setattr(MappedStore, "_write", seen)
        patch.setattr(mx, "asarray", self._asarray, raising=False)

    def _asarray(self, region, copy):
        assert copy is False
        if not self._takes(region.nbytes):
            raise ValueError("[asarray] refused")
        self.sizes.append(region.nbytes)
        array = mx.array(region)
        self._made.append((region, to_numpy(array)))
        return array
