"""Which member of a teacher gets which requests. Pure: reads the members' load, changes nothing."""

import heapq
from collections.abc import Iterable, Mapping, Sequence

from opd_governor.actors.teacher.member import Member

Share = tuple[Member | None, list[int]]
"""A member, None if no one is live, and the places of the requests for it, which fit one call."""


def least_loaded(members: Iterable[Member], tried: Iterable[Member] = ()) -> Member | None:
    """The live member outside `tried` with the fewest tokens queued and in flight; None where there is none."""
    best = None
    for member in members:
        if (best is None or member.load_tokens < best.load_tokens) and member.live.is_set() and member not in tried:
            best = member
    return best


def share_out(members: Sequence[Member], lengths: Mapping[int, int], room_tokens: int) -> list[Share]:
    """Requests to the least loaded live members, in shares that fit one call. `lengths`: place of a request -> its tokens.

    An idle member starts at once with what it is given, so idle ones get one request each in turn. A busy one takes all that
    waits for it in its next call, so there requests stay together: one message for many.
    """
    loads = [(member.load_tokens, index) for index, member in enumerate(members) if member.live.is_set()]
    if not loads:
        return [(None, share) for share in cut(lengths, room_tokens)]
    heapq.heapify(loads)
    given: dict[int, dict[int, int]] = {}
    load, index = heapq.heappop(loads)
    together_tokens = room_tokens if load else 0
    """What may still stay together with the request before."""
    for number, (place, length) in enumerate(lengths.items()):
        if number and length > together_tokens:
            load, index = heapq.heappushpop(loads, (load, index))
            together_tokens = room_tokens if members[index].load_tokens else 0
        given.setdefault(index, {})[place] = length
        load, together_tokens = load + length, together_tokens - length
    return [(members[index], share) for index, own in given.items() for share in cut(own, room_tokens)]


def cut(lengths: Mapping[int, int], room_tokens: int) -> list[list[int]]:
    """Places in order, cut where the padded size would exceed the room; a request longer than the room goes by itself."""
    shares: list[list[int]] = []
    widest = 0
    for place, length in lengths.items():
        widest = max(widest, length)
        if shares and (len(shares[-1]) + 1) * widest <= room_tokens:
            shares[-1].append(place)
        else:
            shares.append([place])
            widest = length
    return shares
