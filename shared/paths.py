"""The URL paths of the runner protocol, spelled once."""

REGISTER = "/api/runners"
ACQUIRE = "/api/runner/acquire"
HEARTBEAT = "/api/runner/heartbeat"
EVENTS = "/api/runner/events"
REPORTS = "/api/runner/reports"
RESUME = "/api/runner/resume"
BYE = "/api/runner/bye"
ROTATE = "/api/runner/rotate"
SCRIPT = "/api/runner/{step_id}"
START = "/api/runner/{step_id}/start"
SOURCE = "/api/runner/{step_id}/source"
LOG = "/api/runner/{step_id}/log"
BLOB = "/api/runner/{step_id}/blobs/{sha256}"
COMPLETE = "/api/runner/{step_id}/complete"
RELEASE = "/api/runner/{step_id}/release"
CLEANED = "/api/runner/{step_id}/cleaned"

ATTEMPT_HEADER = "X-Attempt"
LEASE_HEADER = "X-Lease"
SCRIPT_DIGEST_HEADER = "X-Script-Sha256"
LOG_TIMES_HEADER = "X-Log-Times"

MAX_APPEND_BYTES = 1024 * 1024
BLOB_PART_BYTES = 16 * 1024 * 1024
