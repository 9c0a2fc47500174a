"""Of processes that tests start and end; nothing of the package is needed."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Running, and not only waiting to be noticed by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
