"""Addresses that no judge answers at: link-local ones, where clouds keep a machine's credentials."""

import asyncio
import socket
from ipaddress import IPv6Address, ip_address

from hybrid.core import InputError

__all__ = ["check_host", "check_resolved"]

# Metadata services of clouds outside the link-local ranges: AWS (IPv6), Alibaba, Oracle, Azure.
METADATA = frozenset(map(ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")))
METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "metadata", "instance-data")


def check_host(host: str) -> None:
    """Raises InputError if `host` is such an address, in any of the forms that a resolver takes, or such a name."""
    name = host.rstrip(".").lower()
    if name in METADATA_NAMES:
        raise _refused(host, name)
    try:
        # 2852039166, 0xa9fea9fe and 169.254.43518 are IPv4 addresses too.
        address = name if ":" in name else socket.inet_ntoa(socket.inet_aton(name))
    except OSError:  # a name
        return
    _check_address(host, address)


async def check_resolved(host: str, port: int) -> None:
    """Raises InputError if the name `host` leads to such an address. One that leads nowhere is the client's to tell."""
    check_host(host)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return
    for *_, address in found:
        _check_address(host, str(address[0]))


def _check_address(host: str, text: str) -> None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return
    if isinstance(address, IPv6Address) and (inner := address.ipv4_mapped or address.sixtofour) is not None:
        address = inner
    if address.is_link_local or address in METADATA:
        raise _refused(host, str(address))


def _refused(host: str, address: str) -> InputError:
    return InputError(
        f"base_url must not lead to {address!r} (host {host!r}): link-local addresses and clouds' metadata services "
        "answer with credentials, never as a judge; give the judge's own address"
    )
