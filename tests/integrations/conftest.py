"""Scripts that tests start as programs of their own are not collected: they import a framework that may be missing."""

collect_ignore = ["lightning_ddp.py"]
