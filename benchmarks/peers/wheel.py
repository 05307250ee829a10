"""Builds llama-cpp-python natively from the pinned source distribution, for the tests against it.

``python -m benchmarks.peers.wheel`` prints the path of the wheel. It is kept in the user's cache
folder, because a build takes minutes: one a version, a Python and a CPU. Only the library is in it,
ggml as it is always built and the rest at ``-O1``, which compiles faster: the tests compare
numbers, and the benchmarks have a build of their own (``benchmarks.peers.build``).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import cpu_identity
from benchmarks.peers.build import VERSION, PeerBuildError, obtain_archive
from tools.fetch_ggml import cache_folder, place_file

CMAKE_ARGS = (
    # Runs after llama.cpp's own project(); llama-cpp-python would switch the tools' library on.
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_name('libllama_only.cmake')}",
    "-DGGML_NATIVE=ON",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
)


def wheel_folder() -> Path:
    """Returns the folder of the wheel that fits this Python and this CPU."""
    python = f"{sys.implementation.cache_tag}-{sys.platform}"
    return cache_folder() / "wheels" / f"llama_cpp_python-{VERSION}-{python}-{cpu_identity()}"


def find_wheel(folder: Path) -> Path | None:
    """Returns the wheel in `folder`, or None."""
    return next(iter(folder.glob("llama_cpp_python-*.whl")), None)


def build_wheel(folder: Path) -> Path:
    """Builds the wheel in a scratch folder and moves it into `folder` when it is whole.

    Raises:
        PeerBuildError: The source could not be obtained or the build failed.
    """
    print(f"building llama-cpp-python {VERSION}, once (minutes)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="llama-cpp-python-") as scratch:
        work = Path(scratch)
        archive = obtain_archive(work)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        done = subprocess.run(
            [*pip, "--wheel-dir", str(work / "wheel"), str(archive)],
            env={**os.environ, "CMAKE_ARGS": shlex.join(CMAKE_ARGS)},
            stdout=sys.stderr,
            check=False,
        )
        built = find_wheel(work / "wheel")
        if done.returncode != 0 or built is None:
            raise PeerBuildError("pip could not build llama-cpp-python; see above")
        place_file(built, folder / built.name)
        return folder / built.name


def main() -> int:
    """Builds the wheel where it is missing and prints its path."""
    try:
        folder = wheel_folder()
        print(find_wheel(folder) or build_wheel(folder))
    except (PeerBuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
