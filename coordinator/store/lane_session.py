"""What an action gets as `tx`: a session that a lane makes once and that begins anew with every action."""

from typing import Any

from sqlalchemy import Connection
from sqlmodel import Session

_ALONE = "is_alone"


class LaneSession(Session):
    """Costs nothing as long as an action speaks plain statements over `connection()`.

    The unit of work begins with the first use of rows as objects: in a savepoint of its own where other
    actions share the transaction. `is_alone`: nobody else writes as long as the transaction lasts.
    """

    def __init__(self, connection: Connection, *, shares_transaction: bool, is_alone: bool) -> None:
        super().__init__(
            bind=connection,
            join_transaction_mode="create_savepoint" if shares_transaction else "rollback_only",
            expire_on_commit=False,
            autoflush=True,
        )
        self._connection = connection
        self.info[_ALONE] = is_alone

    def connection(self, *_: Any, **__: Any) -> Connection:
        return self._connection

    def keep(self) -> None:
        """Write what objects have to say, and let go of them."""
        if self.in_transaction() or self.new:
            self.commit()
        self.expunge_all()

    def forget(self) -> None:
        """Let go of everything; undoing the statements is up to the lane."""
        self.close()


def needs_locks(tx: Session) -> bool:
    """False where the transaction has the database to itself, so that no row can change under its eyes."""
    return not tx.info.get(_ALONE, False)
