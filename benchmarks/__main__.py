"""`python -m benchmarks NAME`, run from the root of the repository."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import BENCHMARKS
from maskset.errors import ConfigError
from maskset.files import check_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit code: 0 done, 1 implementations disagree, 2 invalid input."""
    options = parse(arguments)
    try:
        if options.out is not None:
            check_folder(options.out)
    except ConfigError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    if options.name == "gpu":
        return _gpu(options)
    if options.name == "learning":
        from benchmarks import learning

        return learning.run(options)
    from benchmarks.report import Disagreement
    from benchmarks.run import run

    try:
        run(options.name, quick=options.quick, threads=options.threads, out=options.out, images=options.images)
    except (ConfigError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except Disagreement as error:
        print(f"benchmarks: {options.name} failed: {error}", file=sys.stderr)
        return 1
    return 0


def _gpu(options: argparse.Namespace) -> int:
    """Run the checks of a GPU, or their rehearsal."""
    rehearsal = options.device == "cpu" or options.quick
    if options.device == "cpu":  # before torch and Triton are imported, which look once
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory would write to stderr
    import torch

    from benchmarks import gpu

    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: error: there is no GPU that torch can use; --device cpu rehearses the checks.", file=sys.stderr)
        return 2
    folder = options.out or (None if rehearsal else Path(__file__).parent)
    return gpu.run(options.device, options.quick, folder and folder / "results")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the flags; `learning`, which has others, has a parser of its own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["learning"]:
        from benchmarks import learning

        return learning.parse(arguments[1:])
    listed = {
        **BENCHMARKS,
        "gpu": "checks of everything that runs on a GPU, in at most 8 minutes; exit code 1 if one fails",
        "learning": "AP of systems and peers at equal computing time; other options, see `learning --help`",
    }
    names = "\n".join(f"  {name:<12}{description}" for name, description in listed.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed and memory of maskset beside other packages.",
        epilog=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=listed, help="one of the benchmarks below")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round: checks only that the results agree")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    results = "folder for results/NAME.json and a README.md with all results in it (default: only print)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=results)
    parser.add_argument("--images", type=int, metavar="N", help="number of images, for `evaluation` only (default: 500)")
    device = "for `gpu` only: where to compute (default: cuda); cpu rehearses the checks"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=device)
    options = parser.parse_args(arguments)
    if options.name == "learning":
        parser.error("`learning` has other options and comes before them: python -m benchmarks learning --help")
    if options.images is not None and options.name != "evaluation":
        parser.error("--images is an option of `evaluation` only.")
    if options.device != "cuda" and options.name != "gpu":
        parser.error("--device is an option of `gpu` only.")
    return options


if __name__ == "__main__":
    sys.exit(main())
