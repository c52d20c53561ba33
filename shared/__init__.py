"""What coordinator and runner both need, and whose change would change their contract.

Imports the standard library, pydantic and structlog only; never `coordinator` or `runner`.
"""
