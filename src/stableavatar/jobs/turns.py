"""Whose job is next: owners take turns, whatever the number of their jobs."""

import heapq
import math
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping, Sequence


def in_turn(rows: Sequence[sqlite3.Row], turns: Mapping[str, float]) -> Iterator[str]:
    """The ids of waiting jobs, oldest first, in the order in which `take` would take them."""
    last = dict(turns)
    now = max(last.values(), default=0.0)
    jobs_of: dict[str, deque[sqlite3.Row]] = {}
    for row in sorted(rows, key=lambda row: row["started"] is None):
        jobs_of.setdefault(row["owner"], deque()).append(row)

    def place(owner: str) -> tuple[bool, float, int, str]:
        row = jobs_of[owner][0]
        return row["started"] is None, last.get(owner, -math.inf), row["number"], owner

    owners = [place(owner) for owner in jobs_of]
    heapq.heapify(owners)
    while owners:
        owner = heapq.heappop(owners)[-1]
        yield jobs_of[owner].popleft()["id"]
        now += 1.0
        last[owner] = now
        if jobs_of[owner]:
            heapq.heappush(owners, place(owner))
