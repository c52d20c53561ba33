"""How fast Buildmill is: measurements against a limit or a rival in the same run.

scripts/bench runs them; each module holds one measurement and gives back Figures.
"""
