"""The golden check, one file per folder of fixtures: a new folder needs a file here with a list KINDS."""
