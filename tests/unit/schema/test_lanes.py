from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from codeherd_schema.lanes import lane_of, owners_of, shares

names = st.sampled_from(["a", "b", "c"])
lanes = st.builds(lane_of, names, st.one_of(st.none(), names))


def test_a_lane_tells_its_owners() -> None:
    assert owners_of(lane_of("team", "nightly")) == ("team", "nightly")
    assert owners_of(lane_of("team", None)) == ("team", None)
    assert owners_of(lane_of("team", "")) == ("team", "")
    assert owners_of(lane_of('a", "b', "\x1fé\n")) == ('a", "b', "\x1fé\n")


def test_places_go_to_tenants_first_and_to_their_lanes_then() -> None:
    one, two, other = lane_of("a", "1"), lane_of("a", "2"), lane_of("b", "3")

    assert shares([one, two, other], {}, 8) == {one: 2, two: 2, other: 4}


def test_who_holds_the_most_waits_until_the_others_hold_as_many() -> None:
    big, small = lane_of("a", "backfill"), lane_of("b", None)

    assert shares([big, small], {big: 6}, 5) == {small: 5}
    assert shares([big, small], {big: 6}, 10) == {small: 8, big: 2}


def test_what_a_tenant_holds_in_other_lanes_counts() -> None:
    mine, other = lane_of("a", "1"), lane_of("b", "2")

    assert shares([mine, other], {lane_of("a", "gone"): 3}, 4) == {other: 3, mine: 1}


def test_nobody_and_nothing() -> None:
    assert shares([], {}, 5) == {}
    assert shares([lane_of("a", None)], {}, 0) == {}


@given(st.sets(lanes, min_size=1), st.dictionaries(lanes, st.integers(0, 9)), st.integers(0, 40))
def test_every_place_is_given_and_no_one_is_ahead_who_could_have_waited(
    wanting: set[str], held: dict[str, int], places: int
) -> None:
    given_away = shares(sorted(wanting), held, places)

    assert given_away.total() == places
    assert set(given_away) <= wanting
    after = Counter(held) + given_away
    for lane, count in given_away.items():
        for rival in wanting:
            if owners_of(rival)[0] == owners_of(lane)[0] and count:
                assert after[lane] - 1 <= after[rival]
    load: Counter[str] = Counter()
    for lane, count in after.items():
        load[owners_of(lane)[0]] += count
    served = {owners_of(lane)[0] for lane, count in given_away.items() if count}
    for tenant in served:
        for rival in {owners_of(lane)[0] for lane in wanting}:
            assert load[tenant] - 1 <= load[rival]
