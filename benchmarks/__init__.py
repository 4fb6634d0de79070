"""Speed of codeherd against its peers: same machine, same run, same weights, same precision.

    python -m benchmarks.run --write        the engine against other engines
    python -m benchmarks.service --write    the whole service against the engine alone

`workloads` says what is asked, `models` of which weights, `systems` by whom; `contest` lets the systems take
turns, `figures` turns their records into numbers, and `report` turns numbers into tables and rows.
"""
