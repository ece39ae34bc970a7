"""Set how long idle OpenMP threads spin before they sleep. Import this module before torch.

GNU OpenMP, which torch uses on CPUs under Linux, reads `GOMP_SPINCOUNT` once, when torch is loaded.
A spinning thread reacts faster, but blocks its core for other programs.
`benchmarks/openmp.py` measures both. A value set in the environment takes precedence.
"""

import os

SPIN_COUNT = "1000"

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
