"""Nodes with slow links on one machine: network namespaces, joined by veth pairs and a bridge, whose rates `tc tbf` limits."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

from ..config import UserError

BURST, QUEUE = "256kb", "32mb"
"""A token bucket's burst holds a whole segment that the network stack has not cut yet; the queue keeps what many send to one at a time."""


class Network:
    """`nodes` namespaces, each with one link to a switch. Use as a context manager; needs root and iproute2."""

    def __init__(self, nodes: int) -> None:
        """Raises `UserError` where namespaces cannot be made."""
        if os.geteuid() != 0:
            raise UserError("network namespaces need root: run as root, in a container with the capabilities NET_ADMIN and SYS_ADMIN")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise UserError(f"the command {tool} is not installed: install iproute2")
        self.switch = f"shoal{os.getpid()}"
        self.nodes = [f"{self.switch}n{i}" for i in range(nodes)]

    def __enter__(self) -> Network:
        try:
            self._ip("netns", "add", self.switch)
            self._ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self.switch, "link", "set", "bridge", "up")
            for i, node in enumerate(self.nodes):
                port = f"port{i}"
                self._ip("netns", "add", node)
                self._ip("-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self.switch)
                self._ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
                self._ip("-n", node, "addr", "add", f"{self.address(i)}/16", "dev", "eth0")
                for link in ("lo", "eth0"):
                    self._ip("-n", node, "link", "set", link, "up")
        except BaseException:  # a signal must not leave namespaces behind
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def address(self, node: int) -> str:
        return f"10.77.{node // 200}.{node % 200 + 1}"

    def limit(self, mbit: float) -> None:
        """Let every link carry `mbit` megabits a second each way."""
        rate = ["root", "tbf", "rate", f"{mbit:.3f}mbit", "burst", BURST, "limit", QUEUE]
        for i, node in enumerate(self.nodes):
            for namespace, link in ((node, "eth0"), (self.switch, f"port{i}")):
                _run("tc", "-n", namespace, "qdisc", "replace", "dev", link, *rate)

    def inside(self, node: int, command: list[str]) -> list[str]:
        """`command` as one that runs on a node."""
        return ["ip", "netns", "exec", self.nodes[node], *command]

    def _remove(self) -> None:
        for namespace in (*self.nodes, self.switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def _ip(self, *arguments: str) -> None:
        _run("ip", *arguments)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{' '.join(command[:4])}... failed ({said}): network namespaces need root and a kernel with veth and tbf")
