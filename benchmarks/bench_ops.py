"""The ops beside their peers and this machine's copy speed; writes benchmarks/results/ops_<date>_<device>.csv.

python benchmarks/bench_ops.py                 CPU, 1 and 2 threads (the CUDA device where there is one)
python benchmarks/bench_ops.py --only K1 --repeats 9 --threads 1
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from sorahpc.jobs.profile import MALLOC, Row, measure, write_csv
from sorahpc.ops.cases import kernel_cases

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="sizes to try the script with; no figure means anything")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if any(name not in os.environ for name in MALLOC):  # read by the C library at its start, so start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for threads in args.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        for row in measure(kernel_cases(device, args.small, args.only), device, args.repeats):
            rows.append(row)
            print(
                f"{row.case:40} {row.dtype:9} {row.threads} threads  {row.candidate:22} {row.median_ms:10.2f} ms "
                f"{row.gb_s:8.1f} GB/s  {row.of_limit:6.2f} of copy  {row.ours_is_faster_by:6.2f} x ours",
                flush=True,
            )
    if not rows:
        sys.exit(f"bench_ops: no case begins with {args.only!r}")
    slug = re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-")
    out = args.out or RESULTS / f"ops_{rows[0].date[:10]}_{slug}.csv"
    write_csv(rows, out)
    print(out)


if __name__ == "__main__":
    main()
