"""The workflow people write: its steps, their defaults and their bounds.

Shapes and simple bounds live here; what can only be judged across fields and steps is `shared.plan`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_STEPS = 1_000
MAX_SCRIPT_BYTES = 8 * 1024 * 1024
MAX_TIMEOUT_S = 7 * 24 * 3600
MAX_SECRETS = 100
DEFAULT_TIMEOUT_S = 3600
DEFAULT_GRACE_S = 10
DEFAULT_PULL_TIMEOUT_S = 1800
DEFAULT_INFRASTRUCTURE_RETRIES = 2


class WireModel(BaseModel):
    """Strict, closed and camelCase on the wire."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", strict=True, frozen=True
    )


class Resources(WireModel):
    """What a step may use of its machine; what is unset is the runner's default."""

    cpus: Annotated[float | None, Field(gt=0, le=1024, description="CPU cores, fractions allowed")] = None
    memory_mb: Annotated[int | None, Field(ge=6, le=4_194_304, description="memory limit in MiB")] = None
    pids: Annotated[int | None, Field(ge=16, le=1_048_576, description="processes and threads")] = None


class Retry(WireModel):
    """How often a step may run again by itself: `max` after its own failures, `infra` after the machine's."""

    max: Annotated[int, Field(ge=0, le=10, description="Retries after a non-zero exit code")] = 0
    exit_codes: Annotated[
        list[Annotated[int, Field(ge=1, le=255)]],
        Field(max_length=255, description="Exit codes that are retried; empty means all but 0"),
    ] = []
    infra: Annotated[int, Field(ge=0, le=2, description="Retries after an infrastructure failure")] = (
        DEFAULT_INFRASTRUCTURE_RETRIES
    )


class StepSpec(WireModel):
    """One step of a workflow, as the author wrote it."""

    name: Annotated[str, Field(min_length=1, max_length=100, description="Step name")]
    image_slug: Annotated[str, Field(min_length=1, max_length=50, description="Docker image slug")]
    depends_on: Annotated[
        list[str],
        Field(max_length=MAX_STEPS, description="Array of step names this step depends on"),
    ]
    run_script: Annotated[
        str, Field(min_length=1, max_length=MAX_SCRIPT_BYTES, description="Script to run in this step")
    ]
    cache_dirs: Annotated[list[str], Field(max_length=32, description="Directories to cache between builds")]
    output_paths: Annotated[list[str], Field(max_length=1000, description="Paths to artifacts to preserve")]
    env: Annotated[
        dict[str, str], Field(max_length=1000, description="Environment variables of the script")
    ] = {}
    secrets: Annotated[
        list[str],
        Field(max_length=MAX_SECRETS, description="Names of the project's secrets that the script is given"),
    ] = []
    labels: Annotated[
        list[str], Field(max_length=32, description="Labels a runner must have, all of them")
    ] = []
    timeout_seconds: Annotated[
        int, Field(ge=1, le=MAX_TIMEOUT_S, description="Run time limit in seconds")
    ] = DEFAULT_TIMEOUT_S
    grace_seconds: Annotated[
        int, Field(ge=0, le=300, description="Seconds between TERM and KILL when the step is to stop")
    ] = DEFAULT_GRACE_S
    no_output_seconds: Annotated[
        int | None, Field(ge=1, le=MAX_TIMEOUT_S, description="Seconds without output that end the step")
    ] = None
    pull_timeout_seconds: Annotated[
        int, Field(ge=1, le=MAX_TIMEOUT_S, description="Time limit of pulling the image in seconds")
    ] = DEFAULT_PULL_TIMEOUT_S
    queue_timeout_seconds: Annotated[
        int | None, Field(ge=1, le=MAX_TIMEOUT_S, description="Seconds the step may wait for a runner")
    ] = None
    retry: Retry = Retry()
    resources: Resources = Resources()
    network: Annotated[Literal["bridge", "none"], Field(description="Network of the step's container")] = (
        "bridge"
    )
    exclusive: Annotated[
        bool, Field(description="Never run again on its own, as a deployment must not be")
    ] = False
    user: Annotated[Literal["root", "image"], Field(description="Run as root or as the image's own user")] = (
        "root"
    )


class WorkflowSpec(WireModel):
    """A named list of steps."""

    name: Annotated[str, Field(min_length=1, max_length=100, description="Workflow name")]
    steps: Annotated[list[StepSpec], Field(min_length=1, max_length=MAX_STEPS)]
