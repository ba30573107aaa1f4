"""What a wheel says it needs: the minor version of PyTorch that it is built beside. pyproject.toml names this file."""

from importlib.metadata import version


def dynamic_metadata(field, settings):
    major, minor, *_ = version("torch").split(".")
    return [f"torch=={major}.{minor}.*"]
