"""`make gpu`: build, test, sanitize, benchmark and report on a machine with an NVIDIA GPU, within a time limit.

The parts run in this order, each in processes of its own, which end at a limit; a table at the end says what became of
each. Exit status: 0 if no part failed or ran out of time, 1 if one did, 2 if nothing could start.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, NoReturn

from gpu_machine import environment, find_gpu, why_not_here
from gpu_parts import PARTS, Options
from gpu_process import Budget
from gpu_summary import Outcome, summary


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"make gpu: {message}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench/gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=chosen_parts, default=[*PARTS], metavar="PARTS", help="such as build,test")
    parser.add_argument("--list", action="store_true", help="print the parts and what they do")
    parser.add_argument("--minutes", type=minutes, default=9.0, help="time for all parts together (default: 9)")
    parser.add_argument("-k", "--rows", metavar="EXPRESSION", help="benchmark only these rows, as pytest -k")
    parser.add_argument("--compiled", action="store_true", help="torch.compile rows in their turn, not if time remains")
    return parser.parse_args(arguments)


def chosen_parts(text: str) -> list[str]:
    """The parts of "test,build" in the order in which they run."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {name!r}")
    return [part for part in PARTS if part in names]


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return value


def run_parts(names: list[str], options: Options, budget: Budget, outcomes: list[Outcome]) -> None:
    """Append the outcome of each part as it ends, so that an interruption leaves those that did."""
    for place, name in enumerate(names):
        part = PARTS[name]
        budget.start(part.weight / sum(PARTS[later].weight for later in names[place:]))
        if budget.left() <= 0:
            outcome = Outcome(name, "out of time", 0.0, ["not started"])
        else:
            print(f"\n== {name}: {part.what}", flush=True)
            result, notes = part.run(options, budget)
            outcome = Outcome(name, result, budget.seconds(), notes)
        outcomes.append(outcome)
        print(f"== {name}: {outcome.result} after {outcome.seconds:.0f} s", flush=True)


def stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.list:
        print("\n".join(f"{name:10}{part.what}" for name, part in PARTS.items()))
        return 0
    budget = Budget(chosen.minutes * 60)
    variables = environment()
    gpu = find_gpu(variables)
    reason = why_not_here(gpu, chosen.only, variables)
    if gpu is None or reason is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    print(f"{gpu['name']}, compute capability {gpu['capability']}, driver {gpu['driver']}, torch {gpu['torch']}")
    signal.signal(signal.SIGTERM, stop)
    outcomes: list[Outcome] = []
    try:
        run_parts(chosen.only, Options(gpu, variables, chosen.rows, chosen.compiled), budget, outcomes)
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        return 130
    finally:
        print(f"\n{summary(outcomes)}", flush=True)
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
