"""A contender whose process has buffers left over from something before."""

import mlx.core as mx
from cheats import honest

mx.eval(mx.zeros((2**20,)))

run = honest
