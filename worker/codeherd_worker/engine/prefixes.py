"""Remember which slot holds the keys and values of which token prefix, and find the longest one to reuse.

Owns: a trie of granules, a granule being a fixed number of tokens; a path from the root is a prefix that at
least one slot holds. Does not know the cache, who computes a prefix, or who copies it: it is told what a
slot holds and forgets it when told so. Not safe for several threads.

A step of the trie is found by the granule's own ids, never by a hash alone: two prefixes are the same only
if their tokens are. Only whole granules count, so that a prefix ends where a chunk of prefill may end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from codeherd_schema.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Match:
    """A prefix that can be reused."""

    slot: int
    #: Tokens, a multiple of the granule, at least one granule.
    length: int


@dataclass(slots=True, eq=False)
class _Node:
    """The prefix that ends with `granule`."""

    parent: _Node | None
    granule: tuple[int, ...]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    #: Slots that hold this prefix, or a longer one through it. Never empty below the root.
    holders: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Held:
    """What one slot holds: the nodes from the first granule to the last."""

    token_ids: tuple[int, ...] = ()
    path: list[_Node] = field(default_factory=list)


class PrefixIndex:
    """The prefixes that all slots hold; its size is bounded by what they hold."""

    def __init__(self, granule: int) -> None:
        """Start with empty slots.

        Raises:
            InvalidSetting: `granule` (tokens) is below 1.
        """
        if granule < 1:
            raise InvalidSetting(f"a granule has {granule} tokens, must be at least 1")
        self._granule = granule
        self._root = _Node(None, ())
        self._held: dict[int, _Held] = {}

    def hold(self, slot: int, token_ids: Sequence[int], *, length: int | None = None) -> None:
        """Note that a slot holds exactly the whole granules of `token_ids`, and nothing else.

        To be called after each chunk of a prefill. With the same tuple and a growing `length` a call costs
        as much as its new granules; otherwise what was held before is compared first.

        Args:
            slot: whose cache it is.
            token_ids: from position 0 on.
            length: how many of them are computed; all by default.
        """
        held = self._held.setdefault(slot, _Held())
        ids = tuple(token_ids)  # a tuple stays itself
        granules = min(len(ids), len(ids) if length is None else length) // self._granule
        keep = min(granules, len(held.path))
        if ids is not held.token_ids:
            keep = min(keep, self.shared(ids, held.token_ids) // self._granule)
        self._release(slot, held.path, keep)
        held.token_ids = ids
        node = held.path[-1] if held.path else self._root
        for index in range(keep, granules):
            granule = ids[index * self._granule : (index + 1) * self._granule]
            child = node.children.get(granule)
            if child is None:
                child = node.children[granule] = _Node(node, granule)
            child.holders.add(slot)
            held.path.append(child)
            node = child
        if not held.path:
            del self._held[slot]

    def drop(self, slot: int) -> None:
        """Forget what a slot holds, before it is overwritten."""
        held = self._held.pop(slot, None)
        if held is not None:
            self._release(slot, held.path, 0)

    def held(self, slot: int) -> int:
        """Return how many tokens of a sequence a slot holds."""
        held = self._held.get(slot)
        return 0 if held is None else len(held.path) * self._granule

    def longest(
        self, token_ids: Sequence[int], *, limit: int | None = None, among: Collection[int] | None = None
    ) -> Match | None:
        """Find the longest prefix of `token_ids` that a slot holds; one step per granule.

        Args:
            token_ids: the sequence that wants to reuse.
            limit: at most so many tokens; a prompt must keep at least one to compute logits from.
            among: look at these slots only.

        Returns:
            The match, in the lowest slot that has it; None if no slot holds even the first granule.
        """
        allowed = None if among is None else frozenset(among)
        ids = tuple(token_ids)
        length = len(ids) if limit is None else min(len(ids), limit)
        node, depth = self._root, 0
        for end in range(self._granule, length + 1, self._granule):
            child = node.children.get(ids[end - self._granule : end])
            if child is None or (allowed is not None and allowed.isdisjoint(child.holders)):
                break
            node, depth = child, end
        if depth == 0:
            return None
        slots = node.holders if allowed is None else node.holders & allowed
        return Match(min(slots), depth)

    def shared(self, a: Sequence[int], b: Sequence[int]) -> int:
        """Return how many tokens, in whole granules, two sequences share from their start."""
        same, end = 0, min(len(a), len(b)) // self._granule * self._granule
        step = self._granule
        # Steps that double while tokens agree and halve where they do not: sequences that differ early
        # cost one granule, long equal ones a few comparisons that run in C.
        while same < end:
            stop = min(same + step, end)
            if tuple(a[same:stop]) == tuple(b[same:stop]):
                same, step = stop, 2 * step
            elif stop - same == self._granule:
                break
            else:
                granules = (stop - same) // self._granule
                end, step = stop, granules // 2 * self._granule
        return same

    def _release(self, slot: int, path: list[_Node], keep: int) -> None:
        """Shorten a slot's path to `keep` granules; nodes that nobody holds any more go."""
        while len(path) > keep:
            node = path.pop()
            node.holders.discard(slot)
            if not node.holders and node.parent is not None:
                del node.parent.children[node.granule]
