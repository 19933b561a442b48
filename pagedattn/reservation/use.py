"""Where the KV memory of a serving system goes, in slots: the causes of SOSP '23, Figure 2."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class KVUse:
    """What the slots of a KV memory are used for; a slot holds one token's K and V.

    Attributes:
        token_states: slots that hold tokens of running requests.
        reservation: slots kept for tokens that a running request will write later.
        internal: slots kept for a running request that no token will ever be written to: what
            was reserved too much, padding, the end of a last block, finished members of a batch
            that others still hold.
        external: slots that are lost between reservations: the rounding of a buddy allocator, a
            second copy while the cache grows, and free slots that are of no use to the request
            that waits.
        free: slots that are free while no request waits.

    """

    token_states: float
    reservation: float
    internal: float
    external: float
    free: float

    @property
    def num_slots(self) -> float:
        """All slots."""
        return float(sum(astuple(self)))

    @property
    def waste(self) -> float:
        """Share of the memory in use that holds no token; 0 where none is in use."""
        used = self.num_slots - self.free
        return 1 - self.token_states / used if used else 0.0

    def while_one_waits(self) -> KVUse:
        """Count free slots as external: a request waits, and they are of no use to it."""
        return replace(self, external=self.external + self.free, free=0.0)

    def shares(self) -> dict[str, float]:
        """Each use as a share of all slots; the shares sum to 1."""
        total = self.num_slots
        return {field.name: getattr(self, field.name) / total for field in fields(self)}

    def __add__(self, other: KVUse) -> KVUse:
        return KVUse(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> KVUse:
        return KVUse(*(value * factor for value in astuple(self)))
