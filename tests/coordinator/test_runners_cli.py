"""An operator administers runners and their tokens from the command line."""

from pathlib import Path

from coordinator.actions.register_runner import register_runner
from coordinator.store.dialect import open_database
from coordinator.store.lanes import Lanes
from shared.protocol import Registration
from tests.coordinator.test_accounts_cli import buildmill, well
from tests.factories import LOCAL
from tests.fakes import MORNING


def a_runner(data: Path, name: str) -> str:
    database = open_database(f"sqlite:///{data / 'buildmill.db'}")
    lanes = Lanes(database)
    try:
        said = Registration(name=name, labels=["gpu"])
        return lanes.write_and_wait(lambda tx: register_runner(tx, LOCAL, said, now=MORNING)).runner_id
    finally:
        lanes.close()
        database.dispose()


def test_tokens_are_made_shown_without_their_secret_and_revoked(tmp_path: Path) -> None:
    well(buildmill(tmp_path, "tenant", "create", "acme"))
    words = ("runners", "enrol", "the farm", "--tenant", "acme", "--label", "gpu", "--uses", "3")

    token = well(buildmill(tmp_path, *words)).strip()
    well(buildmill(tmp_path, "runners", "enrol", "for all", "--shared", "--no-labels"))

    assert token.startswith("bme_")
    shown = well(buildmill(tmp_path, "runners", "tokens", "list"))
    assert token not in shown
    shared, bound = shown.splitlines()
    assert "usable  0/3  until" in bound and bound.endswith("acme  gpu  the farm")
    assert shared.endswith("shared  no labels  for all")
    assert well(buildmill(tmp_path, "runners", "tokens", "list", "--tenant", "acme")) == f"{bound}\n"
    well(buildmill(tmp_path, "runners", "tokens", "revoke", bound.split()[0]))
    assert "revoked  0/3" in well(buildmill(tmp_path, "runners", "tokens", "list", "--tenant", "acme"))


def test_runners_are_shown_asked_for_a_new_secret_and_revoked(tmp_path: Path) -> None:
    well(buildmill(tmp_path, "tenant", "create", "acme"))
    kept, gone = (a_runner(tmp_path, name) for name in ("kept", "gone"))

    well(buildmill(tmp_path, "runners", "rotate", kept))
    well(buildmill(tmp_path, "runners", "revoke", gone))

    shown = well(buildmill(tmp_path, "runners", "list", "--tenant", "acme"))
    assert shown == f"{kept}  kept  shared  gpu  never heard, new secret wanted\n"
    again = buildmill(tmp_path, "runners", "revoke", gone)
    assert again.exit_code == 1 and "no such runner" in again.output


def test_a_token_is_for_one_tenant_or_for_all(tmp_path: Path) -> None:
    well(buildmill(tmp_path, "tenant", "create", "acme"))

    for more in ((), ("--shared", "--tenant", "acme"), ("--shared", "--label", "x", "--no-labels")):
        assert buildmill(tmp_path, "runners", "enrol", "x", *more).exit_code == 2
    assert well(buildmill(tmp_path, "runners", "tokens", "list")) == ""
