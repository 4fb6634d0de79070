"""Flower for real: who may look, and what in its surroundings cannot open it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.services import free_port, wait_until

PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flower")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A running `codeherd flower` whose surroundings do all they can to open it; no broker answers."""
    port = free_port()
    (folder / "flowerconfig.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nbasic_auth = []\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
    own = {
        "CODEHERD_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
        "CODEHERD_DATA_DIR": str(folder),
        "CODEHERD_FLOWER_PASSWORD": PASSWORD,
        "CODEHERD_FLOWER_PORT": str(port),
        "FLOWER_ADDRESS": "0.0.0.0",
        "FLOWER_BASIC_AUTH": "guest:guest",
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "codeherd_producer.cli", "flower"], env=clean | own, cwd=folder
    )
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: status(f"{url}/healthcheck") == 200 or process.poll() is not None, "flower")
    assert process.poll() is None
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def status(url: str, user: str | None = None) -> int | None:
    headers = {} if user is None else {"Authorization": f"Basic {b64encode(user.encode()).decode()}"}
    try:
        with urlopen(Request(url, headers=headers)) as reply:
            return int(reply.status)
    except HTTPError as err:
        with err:
            return err.code
    except OSError:
        return None


@pytest.mark.parametrize("page", ["/workers", "/tasks", "/broker", "/api/workers", "/api/tasks"])
def test_every_page_asks_for_the_password_that_is_set(url: str, page: str) -> None:
    assert status(url + page) == 401
    assert status(url + page, "codeherd:wrong") == 401
    assert status(url + page, "guest:guest") == 401


@pytest.mark.parametrize("page", ["/tasks", "/api/tasks"])
def test_the_password_opens_pages_and_api(url: str, page: str) -> None:
    assert status(url + page, f"codeherd:{PASSWORD}") == 200


def test_a_config_file_in_the_current_folder_is_not_run(url: str, folder: Path) -> None:
    assert status(f"{url}/healthcheck") == 200
    assert not (folder / "ran").exists()


def test_it_listens_on_loopback_alone(url: str) -> None:
    listening = Path("/proc/net/tcp").read_text()
    port = int(url.rpartition(":")[2])

    # Loopback alone, whatever FLOWER_ADDRESS says.
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
