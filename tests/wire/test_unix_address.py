"""The file of a unix socket: where it may be put, whose it is, what becomes of it; and a lack of descriptors."""

import asyncio
import os
import resource
import socket
import stat
import subprocess
import sys

import pytest
from support.transports import Recorder, eventually

from miles_agents.wire.addresses import AddressUnavailable, BadAddress, UnsafeDirectory
from miles_agents.wire.transport import DIALED
from miles_agents.wire.unix_transport import UnixAcceptor, UnixDialer

NOBODY = 65534


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:1", "ipc:///tmp/s", "unix://relative", "unix://@abstract", "unix:///tmp/" + "x" * 108, "/tmp/s"],
)
async def test_what_is_no_unix_address_is_neither_listened_on_nor_dialed(address):
    with pytest.raises(BadAddress):
        UnixAcceptor(address, Recorder())
    with pytest.raises(BadAddress):
        UnixDialer(address, Recorder())


async def test_directories_must_be_ours_alone(tmp_path):
    inside = tmp_path / "d"
    with pytest.raises(UnsafeDirectory, match="FileNotFoundError"):
        UnixAcceptor(f"unix://{inside}/s", Recorder())
    inside.mkdir()
    for mode in (0o755, 0o710, 0o701, 0o777):
        inside.chmod(mode)
        with pytest.raises(UnsafeDirectory, match=f"{mode:04o}"):
            UnixAcceptor(f"unix://{inside}/s", Recorder())
    inside.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(inside)
    with pytest.raises(UnsafeDirectory, match="links"):
        UnixAcceptor(f"unix://{link}/s", Recorder())
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeDirectory, match="not a directory"):
        UnixAcceptor(f"unix://{tmp_path}/file/s", Recorder())
    acceptor = UnixAcceptor(f"unix://{inside}/s", Recorder())
    assert stat.S_ISSOCK((inside / "s").stat().st_mode)
    acceptor.close()
    assert os.listdir(inside) == []


async def test_the_directory_of_another_user_is_refused(tmp_path):
    if os.geteuid() != 0:
        return  # only root can give a directory away
    inside = tmp_path / "d"
    inside.mkdir(mode=0o700)
    os.chown(inside, NOBODY, NOBODY)
    with pytest.raises(UnsafeDirectory, match=f"belongs to user id {NOBODY}"):
        UnixAcceptor(f"unix://{inside}/s", Recorder())


@pytest.fixture
def private(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def left(private):
    """The socket file of a process that was killed."""
    path = private / "s"
    code = "import os, socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.is_socket()
    return path


async def test_what_a_killed_process_left_behind_is_replaced(left):
    heard, told = Recorder(), Recorder()
    acceptor = UnixAcceptor(f"unix://{left}", heard)
    dialer = UnixDialer(acceptor.address, told)
    await told.until(lambda: bool(told.ups))
    assert dialer.send(DIALED, [b"hello"])
    await heard.until(lambda: bool(heard.messages))
    dialer.close()
    acceptor.close()
    assert not left.exists()


async def test_somebody_who_listens_and_files_that_are_no_sockets_are_left_alone(private):
    (private / "file").write_text("precious")
    (private / "dir").mkdir()
    for name in ("file", "dir"):
        with pytest.raises(AddressUnavailable, match=name):
            UnixAcceptor(f"unix://{private}/{name}", Recorder())
    assert (private / "file").read_text() == "precious"
    living = UnixAcceptor(f"unix://{private}/s", Recorder())
    with pytest.raises(AddressUnavailable):
        UnixAcceptor(living.address, Recorder())
    told = Recorder()
    dialer = UnixDialer(living.address, told)
    await told.until(lambda: bool(told.ups))
    dialer.close()
    living.close()


async def test_a_successor_on_the_same_path_keeps_its_file(private):
    first = UnixAcceptor(f"unix://{private}/s", Recorder())
    os.rename(private / "s", private / "moved")
    second = UnixAcceptor(f"unix://{private}/s", Recorder())
    first.close()
    assert (private / "s").is_socket()
    told = Recorder()
    dialer = UnixDialer(second.address, told)
    await told.until(lambda: bool(told.ups))
    dialer.close()
    second.close()
    assert os.listdir(private) == ["moved"]


async def test_a_file_that_is_gone_already_does_not_disturb_closing(private):
    acceptor = UnixAcceptor(f"unix://{private}/s", Recorder())
    (private / "s").unlink()
    acceptor.close()
    acceptor.close()


# -- scarcity ---------------------------------------------------------------------------------------------------------


async def test_without_descriptors_nobody_is_lost_and_the_loop_does_not_spin(private):
    heard = Recorder()
    acceptor = UnixAcceptor(f"unix://{private}/s", heard)
    knocking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    filling = []
    try:
        while True:
            try:
                filling.append(os.dup(knocking.fileno()))
            except OSError:
                break
        knocking.connect(str(private / "s"))
        for _ in range(200):
            await asyncio.sleep(0)
        assert acceptor.stats.reasons == {"accept: EMFILE": 1}
    finally:
        for fd in filling:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    knocking.send((1).to_bytes(4, "little") + (2).to_bytes(4, "little") + b"hi")
    await heard.until(lambda: bool(heard.messages))
    assert heard.messages[0].data == [b"hi"]
    knocking.close()
    acceptor.close()


async def test_a_dialer_without_descriptors_tries_again(private):
    acceptor, told = UnixAcceptor(f"unix://{private}/s", Recorder()), Recorder()
    spare = os.dup(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    filling = []
    try:
        while True:
            try:
                filling.append(os.dup(spare))
            except OSError:
                break
        dialer = UnixDialer(f"unix://{private}/s", told)
        await eventually(lambda: "EMFILE" in dialer.last_refusal)
    finally:
        for fd in [*filling, spare]:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await told.until(lambda: bool(told.ups))
    dialer.close()
    acceptor.close()


def test_a_dialer_needs_no_listener_to_be_there_first_and_says_what_it_waits_for(private):
    async def main():
        told = Recorder()
        dialer = UnixDialer(f"unix://{private}/later", told)
        await eventually(lambda: "ENOENT" in dialer.last_refusal)
        acceptor = UnixAcceptor(f"unix://{private}/later", Recorder())
        await told.until(lambda: bool(told.ups))
        dialer.close()
        acceptor.close()

    asyncio.run(main())
