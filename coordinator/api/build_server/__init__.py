"""The Build Server API at `/api/...` and the runner protocol at `/api/runner/...`."""
