"""One OpenMP thread for whatever computes here, set before torch is imported: tests are tiny, and
the suite takes about as long on a busy machine. Processes that tests start inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
