"""Set how long an OpenMP thread without work spins before it sleeps. Import this before torch.

GNU's OpenMP, which torch uses on a CPU under Linux, reads `GOMP_SPINCOUNT` once, when torch is
loaded. A spinning thread starts sooner and keeps its core from other programs.
`benchmarks/openmp.py` measures both; a value in the environment is kept.
"""

import os

SPIN_COUNT = "1000"

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
