"""Frameworks in which normkern runs."""


def offline(folder):
    """Return variables of the environment for Ultralytics: send and download nothing, keep settings in this folder."""
    return {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(folder)}
