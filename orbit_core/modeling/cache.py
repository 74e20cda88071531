"""Keys and values of all layers in buffers of fixed capacity: attention reads views, nothing grows while decoding."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KeyValueCache:
    """Per layer [rows, key-value heads, capacity, head size]; `length` positions are filled.

    It has the one method that transformers' attention asks of a cache, `update`; `advance` ends a forward pass.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        return self._append(self._keys, key, layer, end), self._append(self._values, value, layer, end)

    def advance(self, positions: int) -> None:
        self.length += positions

    def rows(self, index: Tensor, capacity: int | None = None) -> KeyValueCache:
        """A cache of the rows that `index` names, in its order and as often as it names them."""
        chosen = KeyValueCache(len(self._keys), capacity or self.capacity)
        chosen.length = self.length
        for mine, its in ((self._keys, chosen._keys), (self._values, chosen._values)):
            for layer, filled in enumerate(mine):
                assert filled is not None
                its[layer] = chosen._buffer(filled, len(index))
                its[layer][:, :, : self.length] = filled[:, :, : self.length].index_select(0, index)  # type: ignore[index]
        return chosen

    def _append(self, store: list[Tensor | None], new: Tensor, layer: int, end: int) -> Tensor:
        buffer = store[layer]
        if buffer is None:
            buffer = store[layer] = self._buffer(new, new.shape[0])
        buffer[:, :, self.length : end] = new
        return buffer[:, :, :end]

    def _buffer(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[3])
