"""The coordinator: keeps projects, workflows, builds, logs and artifacts, and hands out steps.

Imports go one way:
shared > errors > settings > tables > rules > store > actions > api > app > cli
`ls coordinator/actions` is the list of everything the system can do.
"""
