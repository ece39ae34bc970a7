"""Measure the peak rates of a machine, times, and the memory of processes.

The floor (lower bound) of a workload is its FLOPs over the rate of plain matrix products, or its
bytes over the rate of reading a matrix of that size, whichever is longer. Rates are measured
together with the workload, since the load of a machine varies.
"""

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import training.parts.threads  # noqa: F401  # before torch

# isort: split

import torch

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


class Machine:
    """A device with its precision and clock.

    CPU: float32; with one thread times are CPU seconds of this process, which hardly depend on
    other programs; with more threads they are wall seconds. CUDA: bfloat16, with synchronization.

    quick: measure rates only briefly, for a smoke test.
    """

    def __init__(self, device="cpu", threads=1, quick=False):
        self.device, self.is_cuda = torch.device(device), torch.device(device).type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.read_clock = time.perf_counter if self.is_cuda or threads > 1 else time.process_time
        self.hasty = quick
        self.matmul_size = 128 if quick else 8192 if self.is_cuda else 2048
        self.copied_bytes = 1 << (20 if quick else 29)
        self.rate_seconds = 0.0 if quick else 0.4
        if not self.is_cuda:
            torch.set_num_threads(threads)

    def now(self):
        if self.is_cuda:
            torch.cuda.synchronize()
        return self.read_clock()

    def seconds(self, work):
        start = self.now()
        work()
        return self.now() - start

    def matmul_rate(self):
        """Measure the FLOPs per second of square matrix products."""
        size = self.matmul_size
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / self._median(lambda: torch.mm(a, b, out=out))

    def read_rate(self, num_bytes):
        """Measure bytes per second of reading a matrix repeatedly, by products with a vector.

        A matrix that fits into the processor's cache is read faster.
        """
        width = 1024
        rows = max(1, num_bytes // (width * self.dtype.itemsize))
        matrix = torch.ones(rows, width, device=self.device, dtype=self.dtype)
        vector = torch.ones(width, device=self.device, dtype=self.dtype)
        bytes_read = matrix.numel() * matrix.element_size()
        return bytes_read / self._median(lambda: matrix @ vector)

    def copy_rate(self):
        """Measure bytes per second (read and written) of copies larger than the cache."""
        num_bytes = self.copied_bytes
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self._median(lambda: target.copy_(source))

    def _median(self, work):
        work()
        times, end = [], time.perf_counter() + self.rate_seconds
        while time.perf_counter() < end or len(times) < 3:
            times.append(self.seconds(work))
        return statistics.median(times)

    def reset_peak(self):
        """Reset the peak memory; return the bytes in use."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if RESET_PEAK.exists():
            RESET_PEAK.write_text("5")
        return status_bytes("VmRSS")

    def peak(self):
        """Return the peak bytes since `reset_peak`: of tensors on CUDA, else of the process."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else status_bytes("VmHWM")

    def describe(self):
        """Return a description for the JSON."""
        about = {
            "torch": torch.__version__,
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
        }
        if self.is_cuda:
            return about | {"machine": torch.cuda.get_device_name(), "clock": "wall"}
        return about | {
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "clock": "CPU seconds" if self.read_clock is time.process_time else "wall",
        }


def status_bytes(name):
    """Return VmRSS (current memory) or VmHWM (peak memory) of this process."""
    if STATUS.exists():  # getrusage would include the parent process
        lines = STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    kilobytes = platform.system() != "Darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def run_in_subprocess(script, request, trim_heap=False):
    """Run `script --child REQUEST` and return the JSON that it prints.

    A process that fails, for example by lack of memory, gives {"failed": reason}.

    trim_heap: release memory immediately, for exact peaks; slower.
    """
    at_once = (
        {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"} if trim_heap else {}
    )
    command = [sys.executable, str(script), "--child", json.dumps(request)]
    child = subprocess.run(
        command, env=os.environ | at_once, stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        return {"failed": f"the process ended with status {child.returncode}"}
    return json.loads(child.stdout.splitlines()[-1])


def write_json(result, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
