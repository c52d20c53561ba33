"""The coordinator: keeps projects, workflows, builds, logs and artifacts, and hands out steps.

Imports go one way; what stands in one pair of braces does not know each other:
shared > errors > settings > tables > access_tables > rules > {store, sealing, access_tokens, passwords}
> {site, bell, tally} > actions > api > watch > {keys, timekeeping, upkeep, chores, sealer} > app > cli
`ls coordinator/actions` is the list of everything the system can do.
"""
