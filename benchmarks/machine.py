"""Facts about the machine a benchmark ran on, the measured memory bandwidth among them."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

FLAGS_THAT_MATTER = (
    "avx2",
    "f16c",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)


def cpuinfo_field(text: str, field: str) -> str:
    """Returns the first value of a field of /proc/cpuinfo, or an empty string."""
    found = re.search(rf"^{re.escape(field)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def read_cpuinfo() -> str:
    """Returns the text of /proc/cpuinfo, or an empty string where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_identity() -> str:
    """Returns a short digest of the CPU model and its flags; a native build belongs to it."""
    text = read_cpuinfo()
    flags = " ".join(sorted(cpuinfo_field(text, "flags").split()))
    name = cpuinfo_field(text, "model name") or platform.processor()
    return hashlib.sha256(f"{platform.machine()}|{name}|{flags}".encode()).hexdigest()[:16]


def n_cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def measure_bandwidth(n_threads: int, *, mib_per_thread: int = 256, n_passes: int = 8) -> float:
    """Measures the rate at which `n_threads` threads read memory, in bytes per second.

    Raises:
        RuntimeError: There is no C compiler, or the test program failed.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the bandwidth test needs a C compiler (cc, gcc or clang)")
    source = Path(__file__).parent / "peers" / "bandwidth.c"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "bandwidth")
        flags = ["-O3", "-march=native", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", program], check=True)
        arguments = [str(n_threads), str(mib_per_thread << 20), str(n_passes)]
        done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[0])


def read_busy_ticks(text: str) -> int:
    """Returns the CPU time of all processes from the text of /proc/stat, in clock ticks."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, text.split("\n")[0].split()[1:])
    return user + nice + system + irq + softirq


def busy_cores(seconds: float = 1.0) -> float:
    """Returns how many cores were busy while this process slept."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    before, start = read_busy_ticks(stat.read_text()), time.monotonic()
    time.sleep(seconds)
    ticks = read_busy_ticks(stat.read_text()) - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)


def total_memory_bytes() -> int:
    """Returns the size of the physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Machine:
    """What a reader needs to know of the machine to judge a result."""

    cpu: str
    n_cores: int
    flags: list[str]
    memory_bytes: int
    kernel: str
    others_busy_cores: float  # what other processes used just before, in cores
    n_threads: int
    bandwidth_bytes_per_s: float


def describe(n_threads: int) -> Machine:
    """Returns the facts of this machine, with the bandwidth that `n_threads` reach now."""
    text = read_cpuinfo()
    flags = set(cpuinfo_field(text, "flags").split())
    return Machine(
        cpu=cpuinfo_field(text, "model name") or platform.processor(),
        n_cores=n_cores(),
        flags=[flag for flag in FLAGS_THAT_MATTER if flag in flags],
        memory_bytes=total_memory_bytes(),
        kernel=platform.release(),
        others_busy_cores=busy_cores(),
        n_threads=n_threads,
        bandwidth_bytes_per_s=measure_bandwidth(n_threads),
    )


def with_bandwidth_again(machine: Machine) -> Machine:
    """Measures the bandwidth once more and keeps the higher value: noise only ever lowers it."""
    again = measure_bandwidth(machine.n_threads)
    best = max(machine.bandwidth_bytes_per_s, again)
    return replace(machine, bandwidth_bytes_per_s=best)
