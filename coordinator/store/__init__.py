"""The only package with SQL. Functions take the transaction first and are named by what they return.

`insert_`, `get_` (raises NotFound), `find_` (may return None), `list_`, `lock_`, `claim_`, `move_`.
"""
