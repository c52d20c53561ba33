from pathlib import Path

import pytest

from runner.executor.egress import Endpoint, find_resolvers, is_refused_by_default, rules_text


@pytest.mark.threat("E08")
@pytest.mark.parametrize(
    "address", ["169.254.169.254", "127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "100.64.0.1"]
)
def test_link_local_metadata_and_private_addresses_need_an_exception(address: str) -> None:
    assert is_refused_by_default(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "172.32.0.1", "203.0.113.80", "2606:4700::1111"])
def test_the_open_net_needs_none(address: str) -> None:
    assert not is_refused_by_default(address)


def test_exceptions_stand_before_what_they_are_exceptions_of() -> None:
    lines = rules_text(True, [Endpoint("10.0.0.53", 53, "udp")]).splitlines()

    exception = next(n for n, line in enumerate(lines) if "10.0.0.53/32" in line)
    refusal = next(n for n, line in enumerate(lines) if "10.0.0.0/8" in line)
    assert exception < refusal


def test_private_ranges_are_a_setting_and_metadata_is_not() -> None:
    text = rules_text(False, [])

    assert "10.0.0.0/8" not in text
    assert "169.254.0.0/16" in text


def test_resolvers_on_private_addresses_are_let_through(tmp_path: Path) -> None:
    config = tmp_path / "resolv.conf"
    config.write_text(
        "search x\nnameserver 10.0.0.53\nnameserver 127.0.0.53\nnameserver 1.1.1.1\nnameserver fe80::1%eth0\n"
    )

    found = find_resolvers([config, tmp_path / "missing"])

    assert found == [Endpoint("10.0.0.53", 53, "udp"), Endpoint("10.0.0.53", 53, "tcp")]
