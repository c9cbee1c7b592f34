"""A model of four blocks whose loop or blocks a test replaces."""

import mlx.core as mx
import mlx.nn as nn

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, mask=None, **others):
        return x + mx.tanh(self.proj(x))


class Toy(nn.Module):
    """Four blocks; subclasses change the loop."""

    def __init__(self, kind=Block):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = [kind() for _ in range(4)]
        self.head = nn.Linear(WIDTH, 11)

    def __call__(self, tokens):
        return self.head(self.loop(self.embed(tokens)))

    def loop(self, h):
        for layer in self.layers:
            h = layer(h)
        return h


def looped(loop):
    return type("Toy", (Toy,), {"loop": loop})()
