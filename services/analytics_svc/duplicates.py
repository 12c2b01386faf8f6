"""Which events were there before: a filter in memory that mostly answers "surely not"; the store decides the rest.

A Bloom filter (Bloom 1970) in its blocked form (Putze, Sanders and Singler, 2007): all bits of a key are in one 64-bit
word, so that a look-up is one read. With 24 bits of space a key and 5 bits set, one key in 1,000 is looked up in vain.
"""

from array import array

CAPACITY = 1 << 20
_BITS_PER_KEY = 24
_MASK = (1 << 64) - 1


class SeenKeys:
    """Keys that have been added, and a few that have not. Grows by doubling; a key is its 64-bit hash."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._parts: list[array[int]] = []
        self._room = 0
        self._grow(capacity)

    def add(self, key: int) -> bool:
        """Adds a key; says whether it may have been there. False is certain."""
        mask = (
            1 << (key & 63)
            | 1 << (key >> 6 & 63)
            | 1 << (key >> 12 & 63)
            | 1 << (key >> 18 & 63)
            | 1 << (key >> 24 & 63)
        )
        place = (key >> 30) * 0x9E3779B97F4A7C15 & _MASK  # spreads what is left of the key over all words
        for words in self._parts:
            if words[place % len(words)] & mask == mask:
                return True
        if not self._room:
            self._grow(2 * self._capacity)
        words = self._parts[-1]
        words[place % len(words)] |= mask
        self._room -= 1
        return False

    def _grow(self, capacity: int) -> None:
        self._capacity = capacity
        self._room = capacity
        self._parts.append(array("Q", bytes(capacity * _BITS_PER_KEY // 8)))
