"""The command line of `fusionops`: options, their meaning and the exit code. What a command does stands in `commands`.

Exit codes: 0 fine, 1 a check failed, 2 wrong usage or something this machine cannot do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fusionops import FusionError, __version__
from fusionops.compare.workloads import WORKLOADS, Map, Workload
from fusionops.spec import ACTIVATIONS, Merge

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

DEFAULT = WORKLOADS["keras_conv"]
DTYPES = ("float32", "float64", "float16")
OWN_OPTIONS = ("shape", "channels", "upsample", "filters", "kernel", "stride", "padding", "activation")
FEWEST_ROUNDS = 3  # for a median and quartiles


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; `argv` is without its name. Usage errors leave by SystemExit(2), as argparse has it."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        from fusionops.compare import commands

        return OK if getattr(commands, options.command)(options) else FAILED
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in ("rich", "matplotlib"):
            raise
        return _complain(f'this needs {missing.name}: pip install "fusionops[cli]"')
    except MemoryError as problem:
        return _complain(f"this machine has too little memory for it: {problem}")
    except (FusionError, OSError, ValueError) as problem:
        return _complain(str(problem))
    except KeyboardInterrupt:
        return INTERRUPTED


def _complain(problem: str) -> int:
    sys.stderr.write(f"fusionops: {problem}\n")
    return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionops", description="What merging feature maps costs on this machine.")
    parser.add_argument("--version", action="version", version=f"fusionops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    compare = commands.add_parser("compare", help="one merge four ways: add and concat, each fused and materialised")
    _add_problem(compare)
    _add_measurement(compare, rounds=15)

    bench = commands.add_parser("bench", help="fused against materialised on layers of known networks")
    bench.add_argument("names", nargs="*", type=_workload_name, metavar="NAME", help="workloads; see --list")
    bench.add_argument("--list", action="store_true", help="list the workloads and where they come from")
    bench.add_argument("--dtype", choices=DTYPES, default="float32")
    bench.add_argument("--layout", choices=("NHWC", "NCHW"), default="NHWC")
    _add_measurement(bench, rounds=7)

    explain = commands.add_parser("explain", help="which kernel would run, why not the others, and what it costs")
    _add_problem(explain)
    explain.add_argument("--merge", choices=tuple(Merge), help="only this one")
    _add_machine(explain)

    check = commands.add_parser("check", help="test the installed package against its reference")
    _add_machine(check)

    commands.add_parser("info", help="version, backends and why one is unusable, processor, threads")

    plot = commands.add_parser("plot", help="draw the figures that compare or bench wrote with --json")
    plot.add_argument("json", metavar="FILE.json")
    plot.add_argument("--out", metavar="FILE.png", help="default: FILE.png beside FILE.json")
    return parser


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """The merge, its maps and the convolution after it: a named workload, or options that describe one."""
    group = parser.add_argument_group("problem", "default: maps of 128×128×(64+64) into 64 filters 3×3")
    group.add_argument(
        "--workload", type=_workload_name, metavar="NAME", help="a layer of a known network; see bench --list"
    )
    group.add_argument("--shape", type=_integers(3), metavar="N,H,W", help="of the merged map, default 1,128,128")
    group.add_argument("--channels", type=_integers(None), metavar="C,C…", help="of each source, default 64,64")
    group.add_argument("--upsample", type=_integers(None), metavar="F,F…", help="of each source, nearest, default 1,1")
    group.add_argument("--filters", type=_positive, metavar="K", help="default 64")
    group.add_argument("--kernel", type=_pair, metavar="R[,S]", help="default 3")
    group.add_argument("--stride", type=_pair, metavar="H[,W]", help="default 1")
    group.add_argument("--padding", type=_padding, metavar="P", help="same, valid, P, H,W or T,B,L,R; default same")
    group.add_argument("--activation", choices=("none", *ACTIVATIONS), metavar="NAME", help="or none; default relu")
    group.add_argument("--dtype", choices=DTYPES, default="float32")
    group.add_argument("--layout", choices=("NHWC", "NCHW"), default="NHWC")
    parser.set_defaults(workload_of=lambda options: _workload(parser, options))


def _add_measurement(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=_rounds, default=rounds, help=f"turns of every arm, default {rounds}")
    parser.add_argument(
        "--json",
        type=_output,
        metavar="FILE",
        help='write the figures; "-" is standard output, the table then goes to stderr',
    )
    parser.add_argument(
        "--backend", type=_backends, default=("cpu",), metavar="NAME,…", help="cpu, gpu or cpu,gpu; default cpu"
    )
    _add_threads(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", type=_backend, metavar="NAME", help="cpu or gpu; default cpu")
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="T", help="default: every core this process may use")


def _workload(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Workload:
    """The workload that the options name or describe."""
    own = {name: getattr(options, name) for name in OWN_OPTIONS if getattr(options, name) is not None}
    if options.workload is None:
        chosen = _described(parser, own)
    elif own:
        parser.error(f"--workload says what --{next(iter(own))} would; leave one of them out")
    else:
        chosen = WORKLOADS[options.workload]
    return replace(chosen, dtype=options.dtype, layout=options.layout)


def _described(parser: argparse.ArgumentParser, own: dict[str, Any]) -> Workload:
    N, H, W = own.get("shape", (1, 128, 128))
    channels = own.get("channels", (64, 64))
    factors = own.get("upsample", (1,) * len(channels))
    if len(factors) != len(channels):
        parser.error(f"--upsample has {len(factors)} factors, --channels {len(channels)} sources")
    for factor in factors:
        if H % factor or W % factor:
            parser.error(f"--shape {H}×{W} is no multiple of an upsampling by {factor}")
    maps = tuple(Map(C, H // f, W // f, upsample=f) for C, f in zip(channels, factors, strict=True))
    activation = own.get("activation", "relu")
    return replace(
        DEFAULT,
        name="custom" if own else DEFAULT.name,
        network="" if own else DEFAULT.network,
        maps=maps,
        N=N,
        K=own.get("filters", 64),
        kernel=own.get("kernel", (3, 3)),
        stride=own.get("stride", (1, 1)),
        padding=own.get("padding", "same"),
        activation=None if activation == "none" else activation,
    )


def _reject(problem: str) -> NoReturn:
    raise argparse.ArgumentTypeError(problem)


def _integers(count: int | None) -> Callable[[str], tuple[int, ...]]:
    """A parser of positive integers between commas; `count` of them."""

    def parse(text: str) -> tuple[int, ...]:
        numbers = tuple(_positive(part) for part in text.split(","))
        if count is not None and len(numbers) != count:
            _reject(f"{text!r} has {len(numbers)} numbers, needs {count}")
        return numbers

    return parse


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        _reject(f"{text!r} is no positive integer")
    return int(text)


def _rounds(text: str) -> int:
    if _positive(text) < FEWEST_ROUNDS:
        _reject(f"{text} rounds are too few for a median, needs {FEWEST_ROUNDS}")
    return int(text)


def _pair(text: str) -> tuple[int, ...]:
    numbers = _integers(None)(text)
    if len(numbers) > 2:
        _reject(f"{text!r} has {len(numbers)} numbers, needs one or two")
    return numbers * 2 if len(numbers) == 1 else numbers


def _padding(text: str) -> Any:
    if text in ("same", "valid"):
        return text
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, 2, 4):
        _reject(f"{text!r} is not same, valid, P, H,W or T,B,L,R")
    sides = tuple(map(int, parts))
    return sides[0] if len(sides) == 1 else sides if len(sides) == 2 else (sides[:2], sides[2:])


def _output(text: str) -> str:
    """A file that can be written, found out before anything is measured."""
    folder = Path(text).absolute().parent
    if text != "-" and (not folder.is_dir() or Path(text).is_dir() or not os.access(folder, os.W_OK)):
        _reject(f"{text!r} cannot be written")
    return text


def _backend(text: str) -> str:
    """Other unknown names are judged by the library, which knows its backends."""
    if text == "reference":
        _reject("the reference is what kernels are checked with: its time and memory say nothing of theirs")
    return text


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(_backend(part) for part in text.split(","))
    if "" in names or len(set(names)) < len(names):
        _reject(f"{text!r} is no list of different backends, such as cpu,gpu")
    return names


def _workload_name(text: str) -> str:
    if text not in WORKLOADS:
        _reject(f"{text!r} is no workload; fusionops bench --list shows them")
    return text
