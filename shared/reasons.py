"""Why a step did not succeed: one closed table, each reason with its class and its meaning."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a step ended as it did. Only infrastructure reasons are retried without being asked."""

    EXIT_NONZERO = "exit_nonzero"
    TIMEOUT = "timeout"
    NO_OUTPUT = "no_output"
    BUILD_TIMEOUT = "build_timeout"
    OOM = "oom"
    KILLED = "killed"
    LOG_LIMIT = "log_limit"
    SYNTAX_ERROR = "syntax_error"
    NO_SHELL = "no_shell"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_DENIED = "image_denied"
    BAD_CONFIG = "bad_config"
    OUTPUT_MISSING = "output_missing"
    OUTPUT_CONFLICT = "output_conflict"
    DISK_LIMIT = "disk_limit"
    COMMIT_NOT_FOUND = "commit_not_found"
    REGISTRY_UNREACHABLE = "registry_unreachable"
    QUEUE_TIMEOUT = "queue_timeout"
    PULL_TIMEOUT = "pull_timeout"
    CANCELLED = "cancelled"
    RUNNER_LOST = "runner_lost"
    RUNNER_SHUTDOWN = "runner_shutdown"
    CONTAINER_VANISHED = "container_vanished"
    DAEMON_ERROR = "daemon_error"
    PULL_NETWORK = "pull_network"
    DISK_FULL = "disk_full"
    UPLOAD_FAILED = "upload_failed"
    BUILDER_LOST = "builder_lost"
    INTERNAL = "internal"

    @property
    def is_infrastructure(self) -> bool:
        """True when the machine or the network failed, not the user's step."""
        return self in INFRASTRUCTURE_REASONS

    @property
    def meaning(self) -> str:
        return MEANINGS[self]


INFRASTRUCTURE_REASONS = frozenset(
    {
        Reason.RUNNER_LOST,
        Reason.RUNNER_SHUTDOWN,
        Reason.CONTAINER_VANISHED,
        Reason.DAEMON_ERROR,
        Reason.PULL_NETWORK,
        Reason.DISK_FULL,
        Reason.UPLOAD_FAILED,
        Reason.BUILDER_LOST,
        Reason.INTERNAL,
    },
)

MEANINGS = {
    Reason.EXIT_NONZERO: "the script ended with an exit code other than 0",
    Reason.TIMEOUT: "the step ran longer than its time limit",
    Reason.NO_OUTPUT: "the step printed nothing for longer than its limit",
    Reason.BUILD_TIMEOUT: "the whole build ran longer than its time limit",
    Reason.OOM: "the step needed more memory than its limit",
    Reason.KILLED: "the step's processes were killed from outside the script",
    Reason.LOG_LIMIT: "the step printed more than the log limit allows",
    Reason.SYNTAX_ERROR: "the shell cannot parse the script; nothing of it ran",
    Reason.NO_SHELL: "the image holds no shell that can be started",
    Reason.IMAGE_NOT_FOUND: "the image does not exist",
    Reason.IMAGE_DENIED: "the registry refuses the image to this runner",
    Reason.BAD_CONFIG: "the step asks for something that the runner cannot give",
    Reason.OUTPUT_MISSING: "a required output path was not there after the script had ended",
    Reason.OUTPUT_CONFLICT: "what dependencies deliver cannot all stand in the workspace",
    Reason.DISK_LIMIT: "the step wrote more than its disk limit",
    Reason.COMMIT_NOT_FOUND: "the repository has no such commit or branch",
    Reason.REGISTRY_UNREACHABLE: "the image registry cannot be reached",
    Reason.QUEUE_TIMEOUT: "no runner took the step within its queue limit",
    Reason.PULL_TIMEOUT: "the image did not arrive within its limit",
    Reason.CANCELLED: "someone cancelled the build",
    Reason.RUNNER_LOST: "the runner fell silent",
    Reason.RUNNER_SHUTDOWN: "the runner was stopped while the step ran",
    Reason.CONTAINER_VANISHED: "the container was removed from outside",
    Reason.DAEMON_ERROR: "the container engine failed or restarted",
    Reason.PULL_NETWORK: "the network failed while the image was pulled",
    Reason.DISK_FULL: "the runner's disk is full",
    Reason.UPLOAD_FAILED: "the outputs could not be uploaded",
    Reason.BUILDER_LOST: "the image build was interrupted",
    Reason.INTERNAL: "Buildmill itself failed; its own log has the cause",
}
