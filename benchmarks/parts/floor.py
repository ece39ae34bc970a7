"""What a machine reaches at its best, its clock, and how much memory a process had.

A floor is the time that work must take: its FLOPs over the rate of plain matrix products, or its
bytes over the rate at which a matrix of that size is read, whichever is longer. The rates are
measured beside the work they are compared with, since a machine with other work on it is slower
from one minute to the next.
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
FORGET_PEAK = Path("/proc/self/clear_refs")


class Machine:
    """A device with its precision and its clock.

    On the CPU numbers are float32; with one thread, seconds are CPU seconds of this process, which
    other programs hardly lengthen, with more they are those of the clock on the wall. On CUDA
    numbers are bfloat16, and the time is taken once the device has done what it was given.

    hasty: rates are measured in no time, to see that all runs.
    """

    def __init__(self, device="cpu", threads=1, hasty=False):
        self.device, self.is_cuda = torch.device(device), torch.device(device).type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.read_clock = time.perf_counter if self.is_cuda or threads > 1 else time.process_time
        self.hasty = hasty
        self.matmul_size = 128 if hasty else 8192 if self.is_cuda else 2048
        self.copied_bytes = 1 << (20 if hasty else 29)
        self.rate_seconds = 0.0 if hasty else 0.4
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
        """FLOPs per second of square products."""
        size = self.matmul_size
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / self._median(lambda: torch.mm(a, b, out=out))

    def read_rate(self, num_bytes):
        """Bytes per second of reading a matrix of this size again and again, by the product with a
        vector, as decoding does; what fits into a cache of the processor is faster."""
        width = 1024
        rows = max(1, num_bytes // (width * self.dtype.itemsize))
        matrix = torch.ones(rows, width, device=self.device, dtype=self.dtype)
        vector = torch.ones(width, device=self.device, dtype=self.dtype)
        bytes_read = matrix.numel() * matrix.element_size()
        return bytes_read / self._median(lambda: matrix @ vector)

    def copy_rate(self):
        """Bytes per second, read and written, of copying more than a processor's cache holds."""
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

    def forget_peak(self):
        """From now on the peak is a new one; returns the bytes held now."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if FORGET_PEAK.exists():
            FORGET_PEAK.write_text("5")
        return status_bytes("VmRSS")

    def peak(self):
        """The most bytes held since `forget_peak`: by tensors on CUDA, else by the process."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else status_bytes("VmHWM")

    def described(self):
        """For the JSON of record."""
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
    """Of this process: VmRSS, what it holds, or VmHWM, the most that it held."""
    if STATUS.exists():  # getrusage would count the process that started this one, too
        lines = STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    kilobytes = platform.system() != "Darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def in_a_process_of_its_own(script, request, lean=False):
    """What `script --child REQUEST` prints as JSON; {"failed": why} if it dies, as one does that
    needs more memory than there is.

    lean: the C library gives memory back at once, so that a peak is what was needed; slower.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"} if lean else {}
    command = [sys.executable, str(script), "--child", json.dumps(request)]
    child = subprocess.run(
        command, env=os.environ | at_once, stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        return {"failed": f"the process ended with status {child.returncode}"}
    return json.loads(child.stdout.splitlines()[-1])


def write(result, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
