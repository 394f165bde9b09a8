"""fastbn measured against what the user has today: ``python -m benchmarks``."""

import os

# torch's profiler reports its beginning and end on stderr below this.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
