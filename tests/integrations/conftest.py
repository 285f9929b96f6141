"""Scripts that import a framework are run by tests, not collected."""

collect_ignore = ["lightning_ddp.py", "ultralytics_runs.py"]
