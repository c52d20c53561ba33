"""`buildmill drill`: faults on purpose, against a running coordinator, with runners and a project of its own.

What stands in one pair of braces does not know each other:
errors > {history, workload, proxy, engine, own_runner, bare_runner} > {result, user_api} > checker
> stage > faults > rehearsal > report > command
"""
