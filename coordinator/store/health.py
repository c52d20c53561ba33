"""Whether the database answers at all."""

from sqlalchemy import literal, select
from sqlmodel import Session


def is_answering(tx: Session) -> bool:
    return bool(tx.connection().execute(select(literal(1))).scalar_one() == 1)
