"""Settings of the coordinator: read once from the environment and the command line, then passed down."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is `BUILDMILL_<NAME>` in the environment; the command line wins."""

    model_config = SettingsConfigDict(env_prefix="BUILDMILL_", frozen=True, extra="ignore")

    host: Annotated[str, Field(description="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes any free one")] = 3000
    data: Annotated[Path, Field(description="Folder of database, logs, blobs and keys")] = Path(
        "buildmill-data"
    )
    database: Annotated[str, Field(description="Database URL; empty means SQLite in the data folder")] = ""
    auth: Annotated[
        Literal["open", "token"],
        Field(description="`open` trusts every local caller and listens on loopback only; `token` wants one"),
    ] = "open"
    access_token_minutes: Annotated[
        int, Field(ge=1, le=1440, description="Minutes until the access token of a login expires")
    ] = 60
    login_days: Annotated[
        int, Field(ge=1, le=366, description="Days until a login ends that is refreshed again and again")
    ] = 30
    git_protocols: Annotated[
        str, Field(description="Git protocols a repository address may use, separated by commas")
    ] = "https,ssh"
    log_limit: Annotated[int, Field(ge=65536, description="Largest log of one attempt, in bytes")] = (
        256 * 1024 * 1024
    )
    artifact_limit: Annotated[int, Field(ge=0, description="Largest sum of one step's outputs, in bytes")] = (
        8 * 1024**3
    )
    artifact_count: Annotated[int, Field(ge=1, le=20_000, description="Most output files of one step")] = (
        20_000
    )
    heartbeat: Annotated[float, Field(gt=0, le=60, description="Seconds between a runner's heartbeats")] = 5.0
    claim_ttl: Annotated[
        float, Field(gt=0, description="Seconds until a claim that no heartbeat names is ready again")
    ] = 20.0
    lost_after: Annotated[
        float, Field(gt=0, description="Seconds of silence after which a runner's steps are requeued")
    ] = 60.0
    amnesty: Annotated[
        float, Field(ge=0, description="Seconds after a start in which no runner counts as silent")
    ] = 90.0
    write_lanes: Annotated[
        int, Field(ge=1, le=64, description="Connections for writing (Postgres; SQLite has one)")
    ] = 4
    read_lanes: Annotated[int, Field(ge=1, le=64, description="Connections for reading")] = 2
    header_deadline: Annotated[
        float, Field(gt=0, description="Seconds a client has to send a request's headers")
    ] = 10.0
    body_deadline: Annotated[
        float, Field(gt=0, description="Seconds a client has to send a request's body")
    ] = 60.0
    retain_log_days: Annotated[
        int, Field(ge=0, le=36500, description="Days until the logs of a build go; 0 keeps them for ever")
    ] = 0
    retain_artifact_days: Annotated[
        int,
        Field(ge=0, le=36500, description="Days until the artifacts of a build go; 0 keeps them for ever"),
    ] = 0
    retain_build_days: Annotated[
        int, Field(ge=0, le=36500, description="Days until a build goes with all it has; 0 keeps it for ever")
    ] = 0
    retain_builds: Annotated[
        int, Field(ge=0, le=10**9, description="Newest builds that each project keeps; 0 keeps all")
    ] = 0
    retain_megabytes: Annotated[
        int,
        Field(
            ge=0,
            le=10**9,
            description="MiB of artifacts and logs that each project keeps; 0 knows no limit",
        ),
    ] = 0
    retain_unused_hours: Annotated[
        int,
        Field(ge=0, le=8760, description="Hours that bytes stay on the disk when no artifact needs them"),
    ] = 24
    retain_tombstone_days: Annotated[
        int,
        Field(ge=1, le=36500, description="Days in which what has gone answers `expired`, not `not_found`"),
    ] = 365

    rate_limit: Annotated[
        int,
        Field(ge=0, le=10**9, description="Requests per minute of one user to `/api/v1`; 0 sets no limit"),
    ] = 1000
    rate_limit_peer: Annotated[
        int,
        Field(
            ge=0,
            le=10**9,
            description="Requests per minute without a known credential from one address; 0 sets no limit",
        ),
    ] = 300
    login_failures: Annotated[
        int, Field(ge=1, le=10**6, description="Failed logins of one account within a window")
    ] = 10
    login_failures_peer: Annotated[
        int, Field(ge=1, le=10**6, description="Failed logins from one address within a window")
    ] = 50
    login_window_minutes: Annotated[
        int, Field(ge=1, le=1440, description="Minutes of the window in which failed logins are counted")
    ] = 15
    idempotency_hours: Annotated[
        int, Field(ge=1, le=720, description="Hours for which the answer to an `Idempotency-Key` is kept")
    ] = 24

    @property
    def allowed_git_protocols(self) -> frozenset[str]:
        return frozenset(part.strip() for part in self.git_protocols.split(",") if part.strip())

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.sqlite_file}"

    @property
    def sqlite_file(self) -> Path:
        """Where the database is when no other is named."""
        return self.data.absolute() / "buildmill.db"
