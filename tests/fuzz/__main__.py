"""The long run: many inputs for each reader, outside the test suite. `python -m tests.fuzz --help`."""

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from random import Random

from . import SECONDS_WAITING, Case, cases, files_of, groups, judge
from . import __doc__ as about
from .mutations import damage

MIB = 1 << 20


def main() -> int:
    """Run the cases that the command names; return 1 if a reader failed one."""
    p = argparse.ArgumentParser("python -m tests.fuzz", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"groups of cases ({', '.join(groups())}) or single cases (default: all)")
    p.add_argument("--examples", type=int, default=1000, metavar="N", help="inputs of each case (default 1000)")
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (default 0)")
    p.add_argument("--memory", type=int, default=1024, metavar="MIB", help="address space of a process (default 1024)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    flags = p.parse_args()
    if flags.child:
        return work(flags)
    found = [(group, case.name) for group in groups() for case in cases(group)]
    if unknown := set(flags.names) - {name for pair in found for name in pair}:
        p.error(f"no such cases: {', '.join(sorted(unknown))}; there are: {', '.join(name for _, name in found)}")
    chosen = [(group, name) for group, name in found if not flags.names or {group, name} & set(flags.names)]
    print(f"{'case':28} {'inputs':>7} {'read':>7} {'refused':>7} {'failed':>7} {'seconds':>7}", flush=True)
    failed = sum([report(group, name, flags) for group, name in chosen])
    print(f"{failed} failures in {len(chosen)} cases" if failed else f"no failure in {len(chosen)} cases")
    return 1 if failed else 0


def report(group: str, name: str, flags: argparse.Namespace) -> int:
    """Run a case in processes of its own, a new one after each that died; print its line and findings; return how many inputs failed."""
    start, at, end = time.monotonic(), flags.first, flags.first + flags.examples
    counts: Counter[str] = Counter()
    findings: dict[str, list] = {}  # kind -> [how many, number of the first, detail]
    while at < end:
        command = [sys.executable, "-m", __package__, "--child", f"{group}.{name}", "--memory", str(flags.memory)]
        command += ["--first", str(at), "--examples", str(end - at)]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as child,
        ):
            for line in child.stdout:
                answer = json.loads(line)
                at = answer["number"] + 1
                counts[answer["outcome"]] += 1
                if "kind" in answer:
                    findings.setdefault(answer["kind"], [0, answer["number"], answer["detail"]])[0] += 1
            child.wait()
            stderr.seek(0)
            last_words = stderr.read()
        if child.returncode == 1:  # a fault of the case or of the harness: readers' own end in findings
            raise SystemExit(f"{name}: {last_words}")
        if at < end:
            counts["failed"] += 1
            findings.setdefault(f"process ended with code {child.returncode}", [0, at, last_words[-3000:]])[0] += 1
            at += 1
    failures = sum(how_many for how_many, *_ in findings.values())
    columns = [sum(counts.values()), counts["read"], counts["refused"], failures]
    print(f"{name:28} {' '.join(f'{n:7,}' for n in columns)} {time.monotonic() - start:7.0f}", flush=True)
    for kind, (how_many, number, detail) in sorted(findings.items()):
        print(f"    {how_many} x {kind}; for example: {name} --first {number} --examples 1")
        if flags.examples == 1:
            print(detail)
    return failures


def work(flags: argparse.Namespace) -> int:
    """Judge inputs of one case in this process, and say a JSON line about each."""
    resource.setrlimit(resource.RLIMIT_AS, (flags.memory * MIB, flags.memory * MIB))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a reader prints is no answer
    group, _, name = flags.child.partition(".")
    case = next(case for case in cases(group) if case.name == name)
    files = files_of(case)
    verify_reads(case, files)
    for number in range(flags.first, flags.first + flags.examples):
        faulthandler.dump_traceback_later(2 * SECONDS_WAITING, exit=True)  # for what hangs outside Python
        outcome, finding = judge(case, damage(Random(f"{name} {number}"), files, case.damage))
        said = {"number": number, "outcome": outcome} | (vars(finding) if finding else {})
        answers.write(json.dumps(said) + "\n")
    return 0


def verify_reads(case: Case, files: dict[str, bytes]) -> None:
    """Stop if not even the undamaged files are read: nothing would be tested."""
    outcome, finding = judge(case, files)
    if outcome != "read":
        raise SystemExit(f"{case.name}: the valid files are {outcome}: {finding and finding.detail}")


if __name__ == "__main__":
    sys.exit(main())
