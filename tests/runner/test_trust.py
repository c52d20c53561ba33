from pathlib import Path

from runner.executor.egress import Endpoint
from runner.executor.trust import CA_INSIDE, gather


def test_the_bundle_is_mounted_beside_the_image_own_and_named_to_every_tool(tmp_path: Path) -> None:
    bundle = tmp_path / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True)
    bundle.write_text("certificate")

    found = gather({}, scratch=tmp_path / "scratch", root=tmp_path)

    assert {bind.target: bind.source for bind in found.binds}[CA_INSIDE] == bundle
    assert all(bind.read_only for bind in found.binds)
    assert {found.env[name] for name in ("SSL_CERT_FILE", "PIP_CERT", "GIT_SSL_CAINFO")} == {CA_INSIDE}


def test_proxies_and_indexes_are_passed_and_secrets_are_not(tmp_path: Path) -> None:
    environ = {
        "https_proxy": "http://proxy.invalid:3128",
        "PIP_INDEX_URL": "https://index.invalid/simple",
        "NPM_CONFIG_REGISTRY": "https://npm.invalid/",
        "npm_config__authToken": "secret",
        "UV_PUBLISH_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "BUILDMILL_TOKEN": "secret",
        "PATH": "/bin",
    }

    found = gather(environ, scratch=tmp_path / "scratch", root=tmp_path)

    assert set(found.env) == {"https_proxy", "PIP_INDEX_URL", "NPM_CONFIG_REGISTRY"}


def test_paths_of_this_machine_are_not_passed_but_shown(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    environ = {"PIP_FIND_LINKS": str(wheels), "UV_FIND_LINKS": "/nowhere", "PIP_CACHE_DIR": "/root/.cache"}

    found = gather(environ, scratch=tmp_path / "scratch", root=tmp_path)

    assert dict(found.env) == {"PIP_FIND_LINKS": str(wheels)}
    assert [bind.target for bind in found.binds] == [str(wheels)]


def test_settings_of_apt_that_run_programs_stay_here(tmp_path: Path) -> None:
    folder = tmp_path / "etc/apt/apt.conf.d"
    folder.mkdir(parents=True)
    (folder / "proxy").write_text('Acquire::http::Proxy "http://proxy.invalid:3128";')
    (folder / "hooks").write_text('Acquire::x "y"; DPkg::Post-Invoke {"/bin/true";};')

    found = gather({}, scratch=tmp_path / "scratch", root=tmp_path)

    assert [bind.target for bind in found.binds] == ["/etc/apt/apt.conf.d/proxy"]


def test_a_proxy_on_a_private_address_is_let_through_and_one_on_loopback_is_named(tmp_path: Path) -> None:
    environ = {"HTTPS_PROXY": "http://10.1.2.3:3128", "HTTP_PROXY": "http://127.0.0.1:3128"}

    found = gather(environ, scratch=tmp_path / "scratch", root=tmp_path)

    assert found.endpoints == (Endpoint("10.1.2.3", 3128),)
    assert "127.0.0.1:3128" in found.notes[0]
