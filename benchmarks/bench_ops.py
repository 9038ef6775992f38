"""The ops beside their peers and this machine's copy speed; writes benchmarks/results/ops_<date>_<device>.csv.

A case measured again on the same day replaces its rows there; the others stay.

python benchmarks/bench_ops.py                 CPU, 1 and 2 threads (the CUDA device where there is one)
python benchmarks/bench_ops.py --only K1 --repeats 9 --threads 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sorahpc.errors import DataError
from sorahpc.profiling.cases import kernel_cases
from sorahpc.profiling.machine import device_name, now_utc, slug
from sorahpc.profiling.results import Row, merged_rows, read_csv, write_csv
from sorahpc.profiling.timing import keep_freed_memory, measure

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="sizes to try the script with; no figure means anything")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = ".small" if args.small else ""  # beside figures that mean something they would be taken for them
    out = args.out or RESULTS / f"ops_{now_utc()[:10]}_{slug(device)}{small}.csv"
    try:
        earlier = read_csv(out) if out.exists() else []
    except DataError as error:
        parser.error(str(error))
    if others := {row.device for row in earlier} - {device_name(device)}:
        parser.error(f"{out}: expected rows of {device_name(device)}, found some of {', '.join(others)}; see --out")
    rows: list[Row] = []
    for threads in args.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        for case in kernel_cases(device, args.small, args.only):
            for row in measure([case], device, args.repeats):
                rows.append(row)
                print(row, flush=True)
            write_csv(merged_rows(rows, earlier), out)
    if not rows:
        parser.error(f"no case begins with {args.only!r}")
    print(out)


if __name__ == "__main__":
    main()
