"""Settings of the runner: read once from the environment and the command line, then passed down."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is `BUILDMILL_<NAME>` in the environment; the command line wins."""

    model_config = SettingsConfigDict(env_prefix="BUILDMILL_", frozen=True, extra="ignore")

    coordinator: Annotated[str, Field(description="Address of the coordinator")] = "http://127.0.0.1:3000"
    state: Annotated[Path, Field(description="Folder of workspaces, caches, mirrors and journals")] = Path(
        "/var/lib/buildmill"
    )
    name: Annotated[str, Field(description="Name of the runner; the machine's when empty")] = ""
    slots: Annotated[int, Field(ge=1, le=64, description="How many steps run at once")] = 2
    labels: Annotated[str, Field(description="Labels of the runner, separated by commas")] = ""
    only_labelled: Annotated[bool, Field(description="Take none of the steps that ask for no label")] = False
    executor: Annotated[
        Literal["docker", "process"],
        Field(description="`docker` isolates each step; `process` isolates nothing"),
    ] = "docker"
    token_file: Annotated[
        Path | None, Field(description="File with an enrolment token or the registration token")
    ] = None
    credentials: Annotated[
        Path | None, Field(description="File with logins of git hosts and registries (mode 0600)")
    ] = None
    git_protocols: Annotated[
        str, Field(description="Git protocols a repository address may use, separated by commas")
    ] = "https,ssh"
    host_trust: Annotated[
        bool, Field(description="Pass the machine's CA bundle, proxy and package index into containers")
    ] = False
    refuse_private: Annotated[bool, Field(description="Keep containers from private address ranges")] = False
    cache_bytes: Annotated[int, Field(ge=0, description="Most bytes of all caches together")] = 20 * 1024**3
    blob_bytes: Annotated[int, Field(ge=0, description="Most bytes of outputs kept for later steps")] = (
        10 * 1024**3
    )
    source_bytes: Annotated[int, Field(ge=0, description="Most bytes of mirrors and checkouts")] = (
        20 * 1024**3
    )
    step_cpus: Annotated[float | None, Field(gt=0, description="CPU cores of a step that does not say")] = (
        None
    )
    step_memory_mb: Annotated[
        int | None, Field(ge=6, description="MiB of memory of a step that does not say")
    ] = None
    step_disk_mb: Annotated[
        int | None, Field(ge=1, description="MiB of the disk that a running step may take")
    ] = None
    disk_reserve_mb: Annotated[
        int, Field(ge=0, description="MiB that stay free on the disk of the state folder; 0 turns this off")
    ] = 1024
    disk_high_percent: Annotated[
        int, Field(ge=1, le=100, description="Use of a disk above which the longest unused goes; 100 never")
    ] = 85
    disk_low_percent: Annotated[
        int, Field(ge=1, le=100, description="Use of a disk at which removing ends")
    ] = 75
    keep_images: Annotated[
        str, Field(description="Images never removed, separated by commas; `*` stands for any characters")
    ] = ""
    step_pids: Annotated[int, Field(ge=16, description="Processes of a step that does not say")] = 4096
    holders_ahead: Annotated[
        int, Field(ge=0, le=64, description="Network holders kept ready for the next steps")
    ] = 2

    @property
    def allowed_git_protocols(self) -> frozenset[str]:
        return frozenset(part.strip() for part in self.git_protocols.split(",") if part.strip())

    @property
    def kept_images(self) -> list[str]:
        return [part.strip() for part in self.keep_images.split(",") if part.strip()]

    @property
    def label_list(self) -> list[str]:
        return sorted({part.strip() for part in self.labels.split(",") if part.strip()})
