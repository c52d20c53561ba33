"""The command line `buildmill`."""
