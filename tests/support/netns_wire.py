"""The switch of ``support.netns``: a process in a network namespace of its own, with a bridge, a port for each host.

Orders come as lines of JSON on stdin, each is answered by a line. A port that is ordered to be slow or lossy leaves the
bridge, and this process carries its frames to and fro, late or not at all: so neither needs a module of the kernel
(netem) that may not be there. Large frames stay whole, and checksums with whoever computes them (``PACKET_VNET_HDR``).
It ends when stdin does, and with it the namespace and its half of every cable.
"""

from __future__ import annotations

import heapq
import json
import random
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 3
_FRAME_BYTES = 1 << 17
BRIDGE = "br0"


@dataclass(order=True)
class Late:
    """A frame that is on its way."""

    at: float
    number: int
    target: socket.socket = field(compare=False)
    frame: bytes = field(compare=False)


@dataclass
class Wire:
    """Between a port and the bridge, in place of its cable."""

    outer: socket.socket
    inner: socket.socket
    delay_s: float = 0.0
    loss: float = 0.0


class Switch:
    """The bridge, and what is wrong with its cables."""

    def __init__(self) -> None:
        self.wires: dict[str, Wire] = {}
        self.late: list[Late] = []
        self.number = 0
        self.random = random.Random(0)
        run_ip("link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        run_ip("link", "set", BRIDGE, "up")

    def obey(self, order: dict) -> None:
        """One order: ``plug``, ``unplug`` a port; ``spoil`` its cable (``delay_s`` each way, ``loss`` as a share)."""
        port = order["port"]
        match order["order"]:
            case "plug":
                run_ip("link", "set", port, *(() if port in self.wires else ("master", BRIDGE)), "up")
            case "unplug":
                run_ip("link", "set", port, "down")
            case "spoil":
                self.spoil(port, order["delay_s"], order["loss"])

    def spoil(self, port: str, delay_s: float, loss: float) -> None:
        """With neither, the cable is as good as new."""
        if delay_s == 0 and loss == 0:
            wire = self.wires.pop(port, None)
            if wire is not None:
                wire.outer.close()
                wire.inner.close()
                run_ip("link", "del", f"{port}x")
                run_ip("link", "set", port, "master", BRIDGE)
            return
        if port not in self.wires:
            run_ip("link", "set", port, "nomaster")
            run_ip("link", "add", f"{port}x", "type", "veth", "peer", "name", f"{port}y")
            run_ip("link", "set", f"{port}x", "up")
            run_ip("link", "set", f"{port}y", "master", BRIDGE, "up")
            self.wires[port] = Wire(raw_socket(port), raw_socket(f"{port}x"))
        self.wires[port].delay_s, self.wires[port].loss = delay_s, loss

    def carry(self) -> None:
        """Frames and orders until stdin ends."""
        while True:
            ends = {}
            for wire in self.wires.values():
                ends[wire.outer], ends[wire.inner] = (wire, wire.inner), (wire, wire.outer)
            wait = max(0.0, self.late[0].at - time.monotonic()) if self.late else None
            readable, _, _ = select.select([sys.stdin, *ends], [], [], wait)
            for end in readable:
                if end is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    sys.stdout.write(answer_to(self, line) + "\n")
                    sys.stdout.flush()
                    break  # sockets may be gone
                self.take(end, *ends[end])
            self.deliver()

    def take(self, end: socket.socket, wire: Wire, target: socket.socket) -> None:
        """What has come in at one end."""
        while True:
            try:
                frame = end.recv(_FRAME_BYTES)
            except OSError:
                return
            if self.random.random() < wire.loss:
                continue
            self.number += 1
            heapq.heappush(self.late, Late(time.monotonic() + wire.delay_s, self.number, target, frame))

    def deliver(self) -> None:
        """Frames whose time has come."""
        while self.late and self.late[0].at <= time.monotonic():
            late = heapq.heappop(self.late)
            try:
                late.target.send(late.frame)
            except OSError:
                continue  # full, or gone: lost, as on any network


def answer_to(switch: Switch, line: str) -> str:
    """Done, or why not."""
    try:
        switch.obey(json.loads(line))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"failed: {error} {getattr(error, 'stderr', '')}".replace("\n", " ")
    return "done"


def raw_socket(interface: str) -> socket.socket:
    """All frames that come in at an interface, with the kernel's notes on segments and checksums in front."""
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    found.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    found.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    found.bind((interface, _ETH_P_ALL))
    return found


def run_ip(*words: str) -> None:
    """iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    SWITCH = Switch()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    SWITCH.carry()
