"""These are scripts: nothing here is to be collected, doctests neither."""

collect_ignore_glob = ["*.py"]
