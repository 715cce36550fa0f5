"""Measures, prints the tables and puts them into docs/performance.md.

python -m benchmarks.run                              # everything; many minutes on two cores
python -m benchmarks.run transformer peak             # parts of it
python -m benchmarks.run --quick decode               # small sizes, printed alone
python -m benchmarks.run transformer --latent-frames 9 --out somewhere.md
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode, first_frame, generate, peak, processes, training, transformer
from benchmarks.measuring import BenchmarkError, circumstances, show_no_progress
from benchmarks.sizes import FULL, QUICK, Sizes
from stableavatar.errors import InputError
from stableavatar.evaluation.report import check_document, put_between

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
Part = Callable[[Sizes, int], str]

# Every part, what runs it, and its dtypes.
PARTS: dict[str, tuple[Part, str]] = {
    "transformer": (transformer.measure, "float32 and bfloat16"),
    "peak": (peak.measure, "float32 and bfloat16"),
    "decode": (decode.measure, "float32"),
    "generate": (generate.measure, "float32"),
    "first-frame": (first_frame.measure, "float32"),
    "processes": (processes.measure, "float32"),
    "training": (training.measure, "bfloat16"),
}

# Of those that take no number.
THREADS = {"processes": processes.THREADS}


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by make bench -->", f"<!-- end of {name} -->"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Speed and memory beside the nearest peer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", default=False, help="small sizes, printed alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every process")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="where the tables go, unless --quick")
    for field in fields(Sizes):
        many = "+" if isinstance(getattr(FULL, field.name), tuple) else None
        flag = "--" + field.name.replace("_", "-")
        text = f"in place of {getattr(FULL, field.name)}, or of {getattr(QUICK, field.name)} with --quick"
        parser.add_argument(flag, type=int, help=text, nargs=many)
    return parser


def _sizes(options: dict[str, Any]) -> Sizes:
    given = {field.name: options[field.name] for field in fields(Sizes) if field.name in options}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(QUICK if options["quick"] else FULL, **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    unknown = [name for name in options["parts"] if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    try:
        sizes, threads = _sizes(options), options["threads"]
        if not options["quick"]:
            for name in options["parts"]:
                check_document(options["out"], *_markers(name))
    except InputError as error:
        parser.error(str(error))
    torch.set_num_threads(threads)
    show_no_progress()
    for name in options["parts"]:
        part, dtypes = PARTS[name]
        print(f"\n{name}:\n", flush=True)
        try:
            text = f"{part(sizes, threads)}\n\n{circumstances(THREADS.get(name, threads), dtypes)}"
            print(text, flush=True)
            if not options["quick"]:
                put_between(options["out"], text, *_markers(name), title="Speed and memory")
        except (BenchmarkError, InputError) as error:
            print(f"benchmarks, part {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
