"""`python -m benchmarks NAME`, run from the root of the repository."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import BENCHMARKS
from maskset.errors import ConfigError
from maskset.files import check_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit code: 0 done, 1 implementations disagree, 2 invalid input."""
    options = parse(arguments)
    from benchmarks.report import Disagreement
    from benchmarks.run import run

    try:
        if options.out is not None:
            check_folder(options.out)
        run(options.name, quick=options.quick, threads=options.threads, out=options.out, images=options.images)
    except (ConfigError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except Disagreement as error:
        print(f"benchmarks: {options.name} failed: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the flags."""
    names = "\n".join(f"  {name:<12}{description}" for name, description in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory of maskset beside other packages.",
        epilog=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help="one of the benchmarks below")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round: checks only that the results agree")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    results = "folder for results/NAME.json and a README.md with all results in it (default: only print)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=results)
    parser.add_argument("--images", type=int, metavar="N", help="number of images, for `evaluation` only (default: 500)")
    options = parser.parse_args(arguments)
    if options.images is not None and options.name != "evaluation":
        parser.error("--images is an option of `evaluation` only.")
    return options


if __name__ == "__main__":
    sys.exit(main())
