"""The runner: takes ready steps from a coordinator and runs them on this machine.

Imports go one way; what stands in one pair of braces does not know each other:
shared
> {settings, errors, inotify, mask, mounts, slots, deadline, disk, trash, trees, beneath,
spares}
> {durable, credentials, proof, insistence, artifacts, layers, control, room, recency,
orphans}
> reporter > client
> {git, executor, journal, blobs, state_dir, cache, workspace, attempt, log_stream, health}
> {source, ear, lease, rotation, delivery, vigil} > means > {janitor, cleaning} > step_run
> {agent, commands} > cli
"""
