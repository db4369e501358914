"""The command line: configs and modes."""
