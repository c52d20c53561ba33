"""What a running coordinator has besides its database: settings, keys, files of logs and blobs."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from coordinator.access_tokens import AccessTokens
from coordinator.sealing import SecretKeys
from coordinator.settings import Settings
from coordinator.store.blob_files import BlobFiles
from coordinator.store.log_files import LogFiles


@dataclass(frozen=True)
class Site:
    """Made once at the start and handed to the actions that need more than the transaction."""

    settings: Settings
    lease_key: bytes
    secret_keys: SecretKeys
    access_tokens: AccessTokens
    logs: LogFiles
    blobs: BlobFiles
    default_tenant_id: str | None
    started_at: datetime

    @property
    def common_images(self) -> str | None:
        """The tenant whose images every project may use: with open access the one that all images are of."""
        return self.default_tenant_id if self.settings.auth == "open" else None

    @property
    def data(self) -> Path:
        return self.settings.data
