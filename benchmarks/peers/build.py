"""Builds llama.cpp once, natively, from the pinned source distribution, and caches its tools.

``python -m benchmarks.peers.build`` builds what is missing and prints the folder of the tools.
``tools/fetch_ggml.py`` obtains the archive, or ``MODULARBASE_PEER_ARCHIVE`` names a local copy. A
second call returns at once, unless the recipe or the CPU that the build was made for has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.digest import sha256_of
from benchmarks.machine import cpu_identity
from benchmarks.paths import PEERS, ROOT


class PeerBuildError(RuntimeError):
    """The peer could not be obtained or built; the message says what to do."""


LOCK = ROOT / "third_party" / "ggml.lock"


def pinned(field: str) -> str:
    """Returns a field of the lock file that ggml and the peer share."""
    found = re.search(rf"^{field} = (\S+)$", LOCK.read_text(), re.MULTILINE)
    if found is None:
        raise PeerBuildError(f"{LOCK}: {field}: expected a value, found none")
    return found.group(1)


VERSION = pinned("version")
SOURCE_PREFIX = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
SOURCE_FILES = ("CMakeLists.txt", "LICENSE")
SOURCE_FOLDERS = ("cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tools")
SOURCE_PARTS = frozenset((*SOURCE_FILES, *SOURCE_FOLDERS, "vendor"))
TOOLS = (
    "llama-bench",
    "llama-batched-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-completion",
    "llama-server",
)
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_LLAMAFILE=ON",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
ARCHIVE_VARIABLE = "MODULARBASE_PEER_ARCHIVE"


def default_folder() -> Path:
    """Returns the folder that holds the peer's tools and their stamp."""
    return PEERS / f"llama.cpp-{VERSION}"


def recipe_stamp() -> dict[str, str]:
    """Returns what a cached build must agree with to be used again."""
    recipe = json.dumps([VERSION, CMAKE_OPTIONS, TOOLS])
    return {
        "version": VERSION,
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        "cpu": cpu_identity(),
    }


def is_built(folder: Path) -> bool:
    """Says whether `folder` holds every tool, built by this recipe for this CPU."""
    try:
        stamp = json.loads((folder / "stamp.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp == recipe_stamp()) and all((folder / "bin" / t).is_file() for t in TOOLS)


def obtain_archive(folder: Path) -> Path:
    """Returns the path of the source distribution, fetching and verifying it where needed.

    Raises:
        PeerBuildError: The archive is missing, or the fetch script failed.
    """
    named = os.environ.get(ARCHIVE_VARIABLE)
    if named:
        found = sha256_of(Path(named)) if Path(named).is_file() else "no file"
        if found != pinned("sha256"):
            raise PeerBuildError(f"{named}: sha256: expected {pinned('sha256')}, found {found}")
        return Path(named)
    script = ROOT / "tools" / "fetch_ggml.py"
    archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    command = [sys.executable, str(script), "--archive", str(archive)]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode != 0:
        raise PeerBuildError(
            f"could not obtain the source of llama.cpp with {script.name}; "
            f"set {ARCHIVE_VARIABLE} to a local llama_cpp_python-{VERSION}.tar.gz"
        )
    return archive


def extract_source(archive: Path, into: Path) -> Path:
    """Extracts what the build needs of llama.cpp and returns its folder.

    Raises:
        PeerBuildError: A member of the archive would leave the folder, or no source is in it.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(SOURCE_PREFIX)
            if name == member.name or name.split("/")[0] not in SOURCE_PARTS:
                continue
            if ".." in name.split("/") or not (member.isfile() or member.isdir()):
                raise PeerBuildError(f"{archive.name}: unexpected member {member.name}")
            member.name = name
            tar.extract(member, into)
    if not (into / "CMakeLists.txt").is_file():
        raise PeerBuildError(f"{archive.name}: no {SOURCE_PREFIX} in it")
    return into


def run_logged(command: list[str], log: Path) -> None:
    """Runs a build command at low priority, its output in `log`.

    Raises:
        PeerBuildError: The command failed; the message carries the end of the log.
    """
    with log.open("a") as out:
        done = subprocess.run(["nice", *command], stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise PeerBuildError(f"{' '.join(command)} failed, log in {log}:\n{tail}")


def configure(source: Path, build: Path, options: Sequence[str], log: Path) -> None:
    """Configures a CMake project in `build`."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run_logged(["cmake", "-S", str(source), "-B", str(build), *generator, *options], log)


def build_target(build: Path, target: str, log: Path) -> None:
    """Builds one target of a configured project on all cores."""
    jobs = str(os.cpu_count() or 1)
    run_logged(["cmake", "--build", str(build), "-j", jobs, "--target", target], log)


def compile_tools(source: Path, build: Path, log: Path) -> None:
    """Configures and builds every tool in `build`."""
    configure(source, build, CMAKE_OPTIONS, log)
    for number, tool in enumerate(TOOLS, 1):
        print(f"[{number}/{len(TOOLS)}] building {tool}", file=sys.stderr, flush=True)
        build_target(build, tool, log)


def ensure_built(folder: Path | None = None) -> Path:
    """Builds the peer where it is missing and returns the folder of its tools.

    The stamp is written last, so that an interrupted build is never taken for a finished one.

    Raises:
        PeerBuildError: The archive could not be obtained or a build step failed.
    """
    folder = folder or default_folder()
    if is_built(folder):
        return folder / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"building llama.cpp {VERSION} natively, once (minutes)", file=sys.stderr, flush=True)
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as work:
        source = extract_source(obtain_archive(Path(work)), Path(work) / "source")
        build = Path(work) / "build"
        compile_tools(source, build, log)
        (folder / "stamp.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "bin", ignore_errors=True)
        (folder / "bin").mkdir()
        for tool in TOOLS:
            shutil.copy2(build / "bin" / tool, folder / "bin" / tool)
        shutil.copy2(source / "LICENSE", folder / "LICENSE")
    (folder / "stamp.json").write_text(json.dumps(recipe_stamp(), indent=2) + "\n")
    return folder / "bin"


def main() -> int:
    """Builds the peer and prints where its tools are."""
    try:
        print(ensure_built())
    except PeerBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
