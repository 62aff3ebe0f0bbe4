from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.process_cases import open_fds

from miles_agents.agent.port_table import NotLeased, PortTable
from miles_agents.agent.ports import (
    NoFreePort,
    NoUsableRange,
    PortLeases,
    UnknownInterface,
    UnsafeLockDirectory,
    read_local_port_range,
)

PORTS = range(23100, 23116)
OUTGOING = (32768, 60999)

Make = Callable[..., PortLeases]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    before = open_fds()
    made: list[PortLeases] = []

    def build(ports: range = PORTS, seed: int = 1, **options: object) -> PortLeases:
        options = {"lock_dir": tmp_path / "locks", "local_port_range": OUTGOING, **options}
        made.append(PortLeases(ports, rng=random.Random(seed), **options))
        return made[-1]

    yield build
    for leases in made:
        leases.close()
        leases.close()
    assert open_fds() == before


def can_listen(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
            server.listen()
        except OSError:
            return False
    return True


class PortTableMachine(RuleBasedStateMachine):
    """The table against a model of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.ports = [*range(100, 104), *range(110, 115)]
        self.table = PortTable(self.ports, start=7)
        self.owned: dict[int, str] = {}
        self.out: set[int] = set()

    @rule(owner=st.sampled_from("abc"), count=st.integers(1, 4))
    def lease(self, owner: str, count: int) -> None:
        offered = list(self.table.offers())[:count]
        self.table.lease(owner, offered)
        self.owned.update(dict.fromkeys(offered, owner))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def lease_what_is_taken(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(sorted(self.owned)))
        with pytest.raises(NotLeased):
            self.table.lease("thief", [port])

    @rule(owner=st.sampled_from("abc"))
    def release(self, owner: str) -> None:
        expected = {port for port, holder in self.owned.items() if holder == owner}
        assert set(self.table.release(owner)) == expected
        for port in expected:
            del self.owned[port]

    @rule(port=st.sampled_from([100, 103, 110, 114]))
    def quarantine(self, port: int) -> None:
        if port in self.owned:
            self.table.quarantine(port)
            del self.owned[port]
            self.out.add(port)
        else:
            with pytest.raises(NotLeased):
                self.table.quarantine(port)

    @invariant()
    def agrees_with_the_model(self) -> None:
        offers = list(self.table.offers())
        assert len(offers) == len(set(offers))
        assert set(offers) == set(self.ports) - self.owned.keys() - self.out
        assert self.table.quarantined == self.out
        assert sum(self.table.holders().values()) == len(self.owned)
        assert {port: self.table.owner_of(port) for port in self.owned} == self.owned


TestPortTable = PortTableMachine.TestCase
TestPortTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_released_port_rests_until_all_others_were_offered() -> None:
    table = PortTable(range(5))
    table.lease("a", [0, 1])
    table.release("a")
    assert list(table.offers()) == [2, 3, 4, 0, 1]


def test_leased_ports_are_bound_until_they_are_handed_over(make: Make) -> None:
    leases = make()
    ports = leases.lease("engine-0", 3)
    assert len(set(ports)) == 3
    assert set(ports) <= set(PORTS)
    assert not any(can_listen(port) for port in ports)
    leases.hand_over(ports[:2])
    assert [can_listen(port) for port in ports] == [True, True, False]
    assert leases.table.holders() == {"engine-0": 3}
    leases.release("engine-0")
    assert can_listen(ports[2])


def test_the_start_is_random_but_given_by_the_rng(make: Make, tmp_path: Path) -> None:
    firsts = [make(seed=seed, lock_dir=tmp_path / f"{index}").table for index, seed in enumerate((1, 1, 2, 3, 4, 5))]
    offers = [next(table.offers()) for table in firsts]
    assert offers[0] == offers[1]
    assert len(set(offers)) > 2


def test_ports_in_use_by_others_are_not_leased(make: Make) -> None:
    with socket.socket() as v4, socket.socket(socket.AF_INET6) as v6:
        v4.bind(("127.0.0.1", PORTS[2]))
        v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        v6.bind(("::1", PORTS[3]))
        leases = make()
        ports = leases.lease("all", len(PORTS) - 2)
        assert set(PORTS) - set(ports) == {PORTS[2], PORTS[3]}
        with pytest.raises(NoFreePort, match="in use by other programs: 2"):
            leases.lease("more", 1)


@pytest.mark.parametrize("seed", range(8))
def test_consecutive_ports_are_found_wherever_the_ring_begins(make: Make, seed: int) -> None:
    with socket.socket() as low, socket.socket() as high:
        low.bind(("", PORTS[4]))
        high.bind(("", PORTS[11]))
        leases = make(seed=seed)
        ports = leases.lease("engine", 6, consecutive=True)
        assert ports == list(PORTS[5:11])
        with pytest.raises(NoFreePort, match="no 5 consecutive free ports in 23100-23115 for next"):
            leases.lease("next", 5, consecutive=True)
        assert leases.lease("next", 4, consecutive=True) in (list(PORTS[0:4]), list(PORTS[12:16]))


def test_exhaustion_names_the_holders_and_takes_nothing(make: Make) -> None:
    leases = make()
    leases.lease("engine-0", 10)
    leases.lease("rendezvous of mesh 4", 3)
    with pytest.raises(NoFreePort) as caught:
        leases.lease("engine-1", 4)
    assert "engine-0: 10; rendezvous of mesh 4: 3" in caught.value.evidence
    assert caught.value.fields["holders"] == {"engine-0": 10, "rendezvous of mesh 4": 3}
    assert len(leases.lease("engine-1", 3)) == 3


def test_a_quarantined_port_is_not_leased_again(make: Make) -> None:
    leases = make()
    port = leases.lease("engine-0", 1)[0]
    leases.quarantine(port)
    assert leases.table.holders() == {}
    assert port not in leases.lease("engine-0", len(PORTS) - 1)
    with pytest.raises(NoFreePort, match="quarantined after a collision: 1"):
        leases.lease("engine-1", 1)


def test_what_is_not_leased_cannot_be_handed_over_or_quarantined(make: Make) -> None:
    leases = make()
    with pytest.raises(NotLeased):
        leases.hand_over([PORTS[0]])
    with pytest.raises(NotLeased):
        leases.quarantine(PORTS[0])


def test_ports_for_outgoing_connections_are_left_out(make: Make) -> None:
    leases = make(range(23100, 23110), local_port_range=(23104, 40000))
    assert leases.excluded == 6
    assert sorted(leases.lease("all", 4)) == [23100, 23101, 23102, 23103]
    with pytest.raises(NoFreePort, match="excluded, the kernel uses them for outgoing connections: 6"):
        leases.lease("more", 1)


@pytest.mark.parametrize("ports", [range(23104, 23110), range(0), range(10), range(65530, 65540)])
def test_a_range_that_cannot_be_used_is_refused(make: Make, ports: range) -> None:
    with pytest.raises(NoUsableRange):
        make(ports, local_port_range=(23104, 40000))


def test_the_kernels_range_is_read(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("1024\t65000\n")
    assert read_local_port_range(tmp_path / "range") == (1024, 65000)
    assert read_local_port_range(tmp_path / "gone") == (32768, 60999)


def test_an_interface_must_be_one_of_this_host(make: Make) -> None:
    assert make(interface="127.0.0.1").lease("a", 1)
    assert make(interface="::1").lease("a", 1)
    with pytest.raises(UnknownInterface, match=r"cannot listen on 192\.0\.2\.1"):
        make(interface="192.0.2.1")


def test_a_lock_directory_that_others_could_write_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(UnsafeLockDirectory):
            make(lock_dir=tmp_path / name)
    make(lock_dir=tmp_path / "mine")
    assert (make(lock_dir=tmp_path / "new") and (tmp_path / "new").stat().st_mode & 0o777) == 0o700


OTHER_AGENT = f"""
import random, sys
from pathlib import Path
from miles_agents.agent.ports import NoFreePort, PortLeases
leases = PortLeases(range({PORTS.start}, {PORTS.stop}), rng=random.Random(1), lock_dir=Path(sys.argv[1]),
                    local_port_range={OUTGOING})
ports = []
for _ in range(int(sys.argv[2])):
    try:
        ports += leases.lease('other', 1)
    except NoFreePort:
        break
leases.hand_over(ports)
print(*ports, flush=True)
sys.stdin.read()
"""


def other_agent(lock_dir: Path, count: int) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", OTHER_AGENT, str(lock_dir), str(count)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ports_of(process: subprocess.Popen[bytes]) -> set[int]:
    assert process.stdout is not None
    return {int(port) for port in process.stdout.readline().split()}


def test_agents_in_two_processes_never_lease_the_same_port(make: Make, tmp_path: Path) -> None:
    lock_dir = tmp_path / "locks"
    others = [other_agent(lock_dir, 10), other_agent(lock_dir, 10)]
    try:
        first, second = (ports_of(process) for process in others)
        assert first & second == set()
        assert first | second == set(PORTS)
        with pytest.raises(NoFreePort, match=f"locked by other agents: {len(PORTS)}"):
            make().lease("mine", 1)
    finally:
        for process in others:
            process.communicate()


def test_the_ports_of_a_killed_agent_come_back(make: Make, tmp_path: Path) -> None:
    process = other_agent(tmp_path / "locks", 12)
    leases = make()
    taken = ports_of(process)
    assert len(taken) == 12
    assert set(leases.lease("mine", 4)) == set(PORTS) - taken
    os.kill(process.pid, 9)
    process.communicate()
    assert set(leases.lease("mine", 12)) == taken


def test_a_lock_file_that_a_cleaner_removed_is_made_again(make: Make, tmp_path: Path) -> None:
    leases = make(range(23100, 23101))
    leases.lease("a", 1)
    leases.release("a")
    (tmp_path / "locks" / "23100").unlink()
    assert leases.lease("b", 1) == [23100]
    with pytest.raises(NoFreePort):
        make(range(23100, 23101)).lease("c", 1)
