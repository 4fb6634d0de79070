"""What a job, a worker and a hint cost Redis.

Owns: counting the commands of real Celery workers with a null engine, sizes of hints and events, and the
most jobs per second that one Redis takes. Does not know SQL beyond starting such workers.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import redis

from benchmarks.scale import rows
from benchmarks.scale.jobs import MODEL, make_request
from benchmarks.scale.stack import cpu_s_of, database, redis_cpu_s, redis_of
from codeherd_producer.dispatcher import Dispatcher
from codeherd_schema.broker import Broker
from codeherd_schema.hints import Hint
from codeherd_schema.requests import JobKind, Request, Sampling
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.services import RedisServer, wait_until

#: Commands of the measurement itself.
_OWN = frozenset(
    {"info", "config", "config|resetstat", "client", "client|list", "client|setinfo", "client|setname"}
)
#: Slots of the worker.
SLOTS = 8
#: Jobs whose events are weighed.
_WEIGHED = 50
#: Sockets that flood Redis, and jobs in one round trip.
_FLOODS, _BATCH = 4, 20


def measure_hints(server: RedisServer) -> dict[str, Any]:
    """Return the bytes of a hint."""
    settings = SharedSettings(broker_url=Url(server.url))
    with closing(redis_of(server)) as client:
        client.flushall()
        return _hints(settings, client, 1000)


def measure(*, jobs: int, idle_s: float, flood_s: float) -> dict[str, Any]:
    """Return commands, processor time, bytes and clients of Redis, per job, per worker and per hint."""
    with RedisServer() as server, database("sqlite", None) as url, closing(redis_of(server)) as client:
        settings = SharedSettings(database_url=Url(url), broker_url=Url(server.url), publish_window=jobs)
        facts = _hints(settings, client, 1000)
        client.flushall()
        # Redis has clocks of its own.
        alone = _idle(client, idle_s / 2)
        with _worker(settings) as process:
            wait_until(lambda: len(_clients(client, process.pid)) >= 2, "the worker", timeout_s=180)
            time.sleep(1.0)
            facts |= _idle(client, idle_s)
            with_worker_ms = facts["idle_cpu_ms_per_s"]
            facts |= _busy(settings, client, process.pid, jobs, facts)
            facts["idle_cpu_ms_per_s"] = round(with_worker_ms - alone["idle_cpu_ms_per_s"], 3)
            found = _clients(client, process.pid)
            facts["clients_per_worker"] = len(found)
            facts["last_commands_of_clients"] = sorted(one["cmd"] for one in found)
        facts |= _flood(server, client, facts["commands_per_job"], flood_s, facts["hint_message_bytes"])
        return facts


def _hints(settings: SharedSettings, client: redis.Redis, count: int) -> dict[str, Any]:
    memory = _used(client)
    with closing(Broker(settings)) as broker:
        ids = [f"0192aaaa-bbbb-7ccc-8ddd-{i:012x}" for i in range(count)]
        broker.publish([Hint(job_id, rows.QUEUE, JobKind.GENERATE, 0, 1) for job_id in ids])
    key = f"{settings.key_prefix}{rows.QUEUE}"
    message: Any = client.lindex(key, 0)
    return {
        "hint_message_bytes": len(message),
        "hint_memory_bytes": round((_used(client) - memory) / count),
    }


def _idle(client: redis.Redis, idle_s: float) -> dict[str, Any]:
    client.config_resetstat()
    cpu_before = redis_cpu_s(client)
    time.sleep(idle_s)
    counts = {name: round(calls / idle_s, 2) for name, calls in _commands(client).items()}
    return {
        "idle_commands_per_s": counts,
        "idle_cpu_ms_per_s": round((redis_cpu_s(client) - cpu_before) / idle_s * 1000, 3),
    }


def _busy(
    settings: SharedSettings, client: redis.Redis, pid: int, jobs: int, idle: Mapping[str, Any]
) -> dict[str, Any]:
    store, broker = Store.open(settings.database), Broker(settings)
    bytes_by_channel: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    stop = threading.Event()
    with closing(store), closing(broker), closing(_listener(client)) as listener:
        store.submit([_short(i) for i in range(jobs)], queue_of=lambda _: rows.QUEUE)
        client.config_resetstat()
        cpu_before, started_at = redis_cpu_s(client), time.monotonic()
        worker_before = cpu_s_of(pid)
        thread = threading.Thread(target=Dispatcher(store, broker, settings).run, args=(stop,))
        thread.start()
        try:
            while store.count_by_state()[JobState.SUCCEEDED] < jobs:
                time.sleep(0.1)
            worker_s = cpu_s_of(pid) - worker_before
            wall_s = time.monotonic() - started_at
        finally:
            stop.set()
            thread.join()
        cpu_s = redis_cpu_s(client) - cpu_before
        calls = _commands(client)
        # Once more with somebody who listens: to weigh the events.
        listener.psubscribe("*")
        store.submit([_short(i) for i in range(_WEIGHED)], queue_of=lambda _: rows.QUEUE)
        broker.publish(store.due(rows.QUEUE, limit=_WEIGHED))
        wait_until(
            lambda: store.count_by_state()[JobState.SUCCEEDED] == jobs + _WEIGHED,
            "the last jobs",
            timeout_s=180,
        )
        time.sleep(0.5)
        while (message := listener.get_message(timeout=0.2)) is not None:
            if message["type"] == "pmessage":
                name = _event_of(message)
                bytes_by_channel[name] += len(message["data"])
                messages[name] += 1
    background = idle["idle_commands_per_s"]
    per_job = {
        name: round((count - background.get(name, 0) * wall_s) / jobs, 3)
        for name, count in calls.items()
        if count > 0.02 * jobs + 2 * background.get(name, 0) * wall_s
    }
    return {
        "jobs": jobs,
        "jobs_per_s": round(jobs / wall_s, 1),
        "worker_cpu_ms_per_job": round(worker_s / jobs * 1000, 2),
        "commands_per_job": per_job,
        "cpu_us_per_job": round((cpu_s - idle["idle_cpu_ms_per_s"] / 1000 * wall_s) / jobs * 1e6, 1),
        "event_bytes_per_job": {
            name: round(size / _WEIGHED)
            for name, size in bytes_by_channel.items()
            if messages[name] > _WEIGHED / 2
        },
    }


def _short(seed: int) -> Request:
    # The null engine makes every token up.
    return make_request(seed).model_copy(update={"sampling": Sampling(max_new_tokens=1)})


def _event_of(message: Mapping[str, Any]) -> str:
    channel = bytes(message["channel"]).decode()
    # `…/event.task.received`, `…done`
    return channel.rpartition("/")[2].rpartition(":")[2]


def _flood(
    server: RedisServer, client: redis.Redis, per_job: Mapping[str, float], flood_s: float, size: int
) -> dict[str, Any]:
    """Send the commands of very many jobs as fast as Redis takes them."""
    if not flood_s:
        return {}
    count = _floods_of(client, per_job, size)
    payload = b"".join(_packed(client, count * _BATCH))
    replies = len(count) * _BATCH
    done = [0] * _FLOODS
    end_at = time.monotonic() + flood_s

    def flood(index: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            while time.monotonic() < end_at:
                connection.sendall(payload)
                seen = 0
                while seen < replies:
                    # Every reply of these commands is one line, or two for a text that starts with `$`.
                    part = connection.recv(1 << 20)
                    seen += part.count(b"\r\n:") + part.count(b"\r\n$") + part.startswith((b":", b"$"))
                done[index] += _BATCH

    cpu_before = redis_cpu_s(client)
    threads = [threading.Thread(target=flood, args=(i,)) for i in range(_FLOODS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu_s = redis_cpu_s(client) - cpu_before
    return {
        "flood_jobs_per_s": round(sum(done) / flood_s, 1),
        "flood_commands_per_s": round(sum(done) * len(count) / flood_s),
        "flood_cpu_cores": round(cpu_s / flood_s, 2),
        "flood_jobs_per_cpu_s": round(sum(done) / max(cpu_s, 1e-9)),
    }


def _floods_of(client: redis.Redis, per_job: Mapping[str, float], size: int) -> list[tuple[Any, ...]]:
    """Return one job's writes with arguments of their usual sizes; every reply is one line."""
    text = b"m" * size
    templates: dict[str, tuple[Any, ...]] = {
        "lpush": ("LPUSH", "flood", text),
        "brpop": ("LREM", "flood", 1, text),
        "zadd": ("ZADD", "flood-index", 1.0, "tag"),
        "hset": ("HSET", "flood-messages", "tag", text),
        "zrem": ("ZREM", "flood-index", "tag"),
        "hdel": ("HDEL", "flood-messages", "tag"),
        "publish": ("PUBLISH", "flood", b"e" * 650),
        "llen": ("LLEN", "flood"),
        "set": ("EXISTS", "flood"),
        "exists": ("EXISTS", "flood"),
    }
    found = [command for name, command in templates.items() for _ in range(round(per_job.get(name, 0)))]
    return found or [templates["publish"]]


@contextmanager
def _worker(settings: SharedSettings) -> Iterator[subprocess.Popen[bytes]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
    variables = {
        "CODEHERD_DATABASE_URL": str(settings.database_url),
        "CODEHERD_BROKER_URL": str(settings.broker_url),
        "CODEHERD_LOG_LEVEL": "warning",
        "CODEHERD_WORKER_MODEL": MODEL,
        "CODEHERD_WORKER_SLOTS": str(SLOTS),
    }
    options = ["--name", "null", "--device", "cpu", "--parent", str(os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.null_worker", *options],
        env=clean | variables,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _clients(client: redis.Redis, pid: int) -> list[dict[str, str]]:
    """Return the connections of the process as `CLIENT LIST` tells them."""
    ports = _local_ports(pid)
    found: Any = client.client_list()
    return [facts for facts in found if facts["addr"].rpartition(":")[2] in ports]


def _local_ports(pid: int) -> set[str]:
    """Return the ports of the process's own ends of its TCP connections."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return {str(int(f[1].split(":")[1], 16)) for f in (line.split() for line in lines) if f[9] in inodes}


def _commands(client: redis.Redis) -> dict[str, int]:
    facts: Any = client.info("commandstats")
    names = {name.removeprefix("cmdstat_"): facts[name]["calls"] for name in facts}
    return {name: calls for name, calls in names.items() if name not in _OWN}


def _listener(client: Any) -> Any:
    # redis-py leaves this method without types, and the next one too.
    return client.pubsub()


def _packed(client: Any, commands: Sequence[tuple[Any, ...]]) -> Sequence[bytes]:
    packed: Sequence[bytes] = client.connection_pool.get_connection().pack_commands(commands)
    return packed


def _used(client: redis.Redis) -> int:
    facts: Any = client.info("memory")
    return int(facts["used_memory"])
