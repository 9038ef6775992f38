"""With this folder on PYTHONPATH, `sorahpc encode|train|...` run the tiny jobs beside this file: the launching, the
worker and the scheduler are the real ones, and no task needs torch."""

from pathlib import Path

import sorahpc.jobs

sorahpc.jobs.__path__.insert(0, str(Path(__file__).parent / "jobs"))
