"""The runner: takes ready steps from a coordinator and runs them on this machine.

Imports go one way:
shared > settings, errors
> {client, executor, workspace, cache, artifacts, journal}
> {log_stream, delivery, lease} > step_run > agent > cli
"""
