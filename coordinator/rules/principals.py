"""Who counts as one where something is counted: a user with all its tokens, a peer with all its addresses."""

from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network

_PREFIX = 64
NOBODY = "unknown"


def principal_of(user_id: str | None, credential: str) -> str:
    """The user, whatever it logged in or made tokens with; else what a credential of nobody is called."""
    return f"user:{user_id}" if user_id is not None else credential


def peer_of(address: str) -> str:
    """The IPv4 address, or the network that an IPv6 address lies in: whoever has one of it has all."""
    try:
        return str(IPv4Address(address))
    except AddressValueError:
        pass
    try:
        found = IPv6Address(address.partition("%")[0])
    except AddressValueError:
        return NOBODY
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(IPv6Network((found, _PREFIX), strict=False))
