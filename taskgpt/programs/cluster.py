"""Test a Dask cluster before a long run on it.

    taskgpt cluster check tcp://10.0.0.1:8786                        # its workers: versions, cores, memory, speed, links, clocks
    taskgpt cluster check tcp://10.0.0.1:8786 --graph gpt2-xl        # is there memory for it?
    taskgpt cluster check my-cluster.toml --set ranks=4 --json check.json
    taskgpt cluster check cluster-local --graph tiny                 # two worker processes that are started here

Prints a row for each worker: GFLOP/s of float32 products on all its cores; and of the ring of all workers, by the links that gradients
take, the time to the next worker and to the one before, and how fast large messages come while as many go. Of a worker that has something
else to do, nothing is measured. Ends with exit code 2 if a training would be refused, and says why.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from taskgpt.cluster.facts import versions
from taskgpt.config import CLUSTER, GraphConfig, load_graph, load_scheduler
from taskgpt.errors import UserError, run_program, shorten
from taskgpt.files import verify_can_write, write_whole
from taskgpt.gpt2.model import GPT2
from taskgpt.lab import layout
from taskgpt.lab.named import overridden
from taskgpt.lab.report import table_of
from taskgpt.programs.arguments import Parser, add_changes, add_graph, add_wide

COLUMNS = {
    "worker": ("address", ""),
    "machine": ("host", ""),
    "cores": ("cores", "d"),
    "free GiB": ("free_gib", ".1f"),
    "GFLOP/s": ("gflops", ".0f"),
    "us to next": ("next_us", ".0f"),
    "us to previous": ("previous_us", ".0f"),
    "GB/s to next": ("next_gbs", ".2f"),
    "GB/s to previous": ("previous_gbs", ".2f"),
    "clock ms": ("clock_ms", ".1f"),
    "verdict": ("verdict", ""),
}
SPARE = "fit, to spare"
SCALES = {
    "free_gib": ("free_bytes", 2**-30),
    "next_us": ("next_latency_s", 1e6),
    "previous_us": ("previous_latency_s", 1e6),
    "next_gbs": ("next_bytes_s", 1e-9),
    "previous_gbs": ("previous_bytes_s", 1e-9),
    "clock_ms": ("clock_offset_s", 1e3),
}  # what a column is of what was found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 2 also for a cluster that a training would not run on."""
    parser = Parser("taskgpt cluster", __doc__)
    verbs = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    what = "test a cluster: its workers, their speed, the links between them"
    check = verbs.add_parser("check", help=what, doc=f"{what}\n\n{parser.examples('check')}")
    check.add_argument("cluster", metavar="CLUSTER", help="tcp://HOST:PORT, tls://HOST:PORT, or a cluster file's name or path")
    add_graph(check, "gpt2-124m")
    add_changes(check)
    check.add_argument("--json", metavar="FILE", help="write all that was found")
    add_wide(check)
    return run_program("taskgpt cluster", lambda: check_cluster(parser.parse_args(argv)))


def check_cluster(flags: argparse.Namespace) -> int:
    """Look at a cluster, and print what was found. Raises UserError for one that cannot be opened."""
    if flags.json is not None:
        verify_can_write(flags.json)
    of_graph, of_scheduler = overridden(flags.graph, flags.cluster, flags.tiles, flags.set, None)
    graph, chosen = load_graph(*of_graph), load_scheduler(*of_scheduler, may_be_cluster=True)
    if chosen.scheduler != CLUSTER:
        raise UserError(f"{shorten(flags.cluster)}: wanted a cluster, got the scheduler {chosen.scheduler}, which runs in this process")
    from taskgpt.cluster import opening  # here, as Dask's distributed takes half a second to import

    with opening.opened(chosen.settings, print) as client:
        found = look_at(client, chosen.settings, graph)
    print(text_of(found, layout.terminal_width(flags)))
    if flags.json is not None:
        write_whole(flags.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 2 if found["faults"] else 0


def look_at(client: Any, settings: Any, graph: GraphConfig) -> dict[str, Any]:
    """Return all that is found of a cluster: `workers`, a table each; `faults` that a training would be refused for; `notes`."""
    from taskgpt.cluster import checks, speeds

    checks.wait_for_workers(client, settings)
    found = checks.look(client)
    needed = GPT2.bytes_needed(graph.model, graph.batch, graph.tiles, graph.options)
    members, faults = checks.fit(found, needed)
    ranks = members[: settings.ranks or None]
    faults += checks.crowded(ranks, found, needed)
    free = [member for member in members if not found[member.address]["busy_with"]]
    measured = speeds.measure(client, free)
    workers = [
        {**asdict(member), **found[member.address], **measured.get(member.address, {}), "verdict": _verdict(member, found, measured, ranks)}
        for member in members
    ]
    unfit = [address for address in found if address not in {member.address for member in members}]
    workers += [{"address": address, **(of if isinstance(of := found[address], dict) else {}), "verdict": "unfit"} for address in unfit]
    failures = [f"{worker['address']}: {worker['failed']}" for worker in workers if "failed" in worker]
    about = {"cluster": settings.where, "graph": graph.name, "needed_bytes": needed, "versions": versions(), "ranks": len(ranks)}
    notes = [*checks.notes_on(found), *_network(workers, graph, settings, len(ranks))]
    return {**about, "workers": workers, "faults": faults + failures, "notes": notes}


def _verdict(member: Any, found: dict[str, Any], measured: dict[str, Any], ranks: list[Any]) -> str:
    if "failed" in measured.get(member.address, {}):
        return "unreachable"
    return "busy" if found[member.address]["busy_with"] else "fit" if member in ranks else SPARE


def _network(workers: list[dict[str, Any]], graph: GraphConfig, settings: Any, ranks: int) -> list[str]:
    """Say how long a step's gradients take over the slowest link, if they do nothing but that."""
    speeds = [worker[key] for worker in workers for key in ("next_bytes_s", "previous_bytes_s") if key in worker]
    if not speeds or ranks < 2:
        return []
    nbytes = graph.model.parameter_count() * (2 if settings.wire == "bf16" else 4)
    seconds = 2 * (ranks - 1) / ranks * nbytes / min(speeds)
    sent = f"gradients of {graph.name}, {nbytes / 1e6:,.1f} MB as {settings.wire}"
    return [f"{sent}, take {seconds:.2g} s a step among {ranks} ranks over the slowest link, {min(speeds) / 1e9:.2f} GB/s"]


def text_of(found: dict[str, Any], width: int | None) -> str:
    """Return it for people: what was found of each worker, then what it means."""
    empty, rows = dict.fromkeys((key for key, _ in COLUMNS.values()), None), []
    for worker in found["workers"]:
        scaled = {name: worker[key] * scale for name, (key, scale) in SCALES.items() if key in worker}
        rows.append(empty | worker | scaled)
    lines = [layout.to_text(table_of("", COLUMNS, rows), width), ""]
    lines.append("here: " + ", ".join(f"{what} {version}" for what, version in found["versions"].items()))
    lines += [f"BLAS: {blas}" for blas in sorted({worker["blas"] for worker in found["workers"] if "blas" in worker})]
    lines += [f"note: {note}" for note in found["notes"]]
    lines += [f"fault: {fault}" for fault in found["faults"]]
    needed = f"{found['graph']}, {found['needed_bytes'] / 2**30:.1f} GiB a rank"
    if found["faults"]:
        return "\n".join([*lines, f"a training of {needed}, would be refused"])
    hosts = len({worker["host"] for worker in found["workers"] if worker["verdict"] != SPARE})
    ranks = f"{found['ranks']} rank{'s' * (found['ranks'] > 1)} on {hosts} machine{'s' * (hosts > 1)}"
    return "\n".join([*lines, f"a training of {needed}, would begin with {ranks}"])


if __name__ == "__main__":
    sys.exit(main())
