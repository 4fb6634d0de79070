"""Divide a queue's places among those who wait for them.

Owns: what a lane is, and who is next when there are fewer places than jobs. A lane holds the jobs of one
batch or run of one tenant, or a tenant's single jobs. Does not know SQL (`codeherd_schema.hints` asks it).

Max-min fairness over what is held now: the next place goes to the tenant that holds the fewest, and within it
to the lane that holds the fewest. A backfill of 100,000 jobs so delays nobody by more than one place.
Nothing is remembered: what is held says it all, so any number of dispatchers agree.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping


def lane_of(tenant: str, batch: str | None) -> str:
    """Return the lane of a job.

    Args:
        tenant: its owner.
        batch: the batch or run that it belongs to; None for a single job.
    """
    return json.dumps([tenant, batch], ensure_ascii=False)


def owners_of(lane: str) -> tuple[str, str | None]:
    """Return the tenant of a lane, and its batch; None for single jobs."""
    tenant, batch = json.loads(lane)
    return tenant, batch


def shares(lanes: Iterable[str], held: Mapping[str, int], places: int) -> Counter[str]:
    """Return how many of the `places` each lane gets.

    Args:
        lanes: that want places, as many as they can get; among equals the first is first.
        held: places that lanes hold already, also of lanes that want no more.
        places: to be given away.
    """
    given: Counter[str] = Counter()
    for lane, _ in zip(_turns(lanes, held), range(places), strict=False):
        given[lane] += 1
    return given


def _turns(lanes: Iterable[str], held: Mapping[str, int]) -> Iterator[str]:
    """Say for ever whose turn it is."""
    loads: Counter[str] = Counter()
    for lane, count in held.items():
        loads[_tenant(lane)] += count
    waiting: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for number, lane in enumerate(lanes):
        waiting[_tenant(lane)].append((held.get(lane, 0), number, lane))
    for own in waiting.values():
        heapq.heapify(own)
    tenants = [(loads[tenant], number, tenant) for number, tenant in enumerate(waiting)]
    heapq.heapify(tenants)
    while tenants:
        load, number, tenant = tenants[0]
        own_load, own_number, lane = waiting[tenant][0]
        yield lane
        heapq.heapreplace(waiting[tenant], (own_load + 1, own_number, lane))
        heapq.heapreplace(tenants, (load + 1, number, tenant))


def _tenant(lane: str) -> str:
    return owners_of(lane)[0]
