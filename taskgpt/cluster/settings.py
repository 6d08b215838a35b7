"""The keys of scheduler_configs/cluster.toml: which cluster, or who starts one, and how a training run is spread over it."""

import re
from dataclasses import dataclass, field

STARTERS = ("", "local", "ssh", "slurm", "pbs", "mpi")
PROTOCOLS = ("tcp", "tls", "ucx", "ucxx")  # Dask's; a rank reaches another by the same
_OF_STARTERS = {
    "hosts": ("ssh",),
    "ssh_config": ("ssh",),
    "python": ("ssh", "slurm", "pbs"),
    "interface": ("ssh", "slurm", "pbs", "mpi"),
    "queue": ("slurm", "pbs"),
    "walltime": ("slurm", "pbs"),
    "memory": ("slurm", "pbs"),
    "directives": ("slurm", "pbs"),
    "prologue": ("slurm", "pbs"),
    "cores": ("slurm", "pbs"),
}  # what only some starters take
_MOST_WORKERS = {"at_least": 0, "at_most": 4096}


@dataclass(frozen=True)
class Settings:
    """The keys of scheduler_configs/cluster.toml, which explains each. Raises ValueError for keys that do not go together."""

    address: str
    scheduler_file: str
    start: str = field(metadata={"choices": STARTERS})
    members: int = field(metadata={"at_least": 1, "at_most": 4096})
    hosts: str
    ssh_config: str
    python: str
    interface: str
    queue: str
    walltime: str
    cores: int = field(metadata=_MOST_WORKERS)
    memory: str
    directives: str
    prologue: str
    ranks: int = field(metadata=_MOST_WORKERS)
    workers: int = field(metadata=_MOST_WORKERS)
    wait_s: float = field(metadata={"at_least": 0, "at_most": 10**6})
    timeout_s: float = field(metadata={"at_least": 1, "at_most": 3600})
    hang_s: float = field(metadata={"at_least": 1, "at_most": 10**6})
    wire: str = field(metadata={"choices": ("fp32", "bf16")})
    zero: bool
    stages: int = field(metadata=_MOST_WORKERS)
    bucket_mib: float = field(metadata={"at_least": 0.001, "at_most": 1024})
    collectives: str = field(metadata={"choices": ("auto", "dask", "mpi")})
    tls_ca_file: str
    tls_cert: str
    tls_key: str
    generations: str
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})

    def __post_init__(self) -> None:
        given = [name for name in ("address", "scheduler_file", "start") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f'{" and ".join(given)}: wanted one of them, got {len(given)}; set the others to ""')
        if self.address:
            object.__setattr__(self, "address", full_address(self.address))
        for key, starters in _OF_STARTERS.items():
            if getattr(self, key) and self.start not in starters:
                wanted = " or ".join(f'"{each}"' for each in starters)
                raise ValueError(f'{key}: is for start = {wanted}, got start = "{self.start}"; leave it out')
        if self.start == "ssh" and not self.hosts.split():
            raise ValueError('hosts: start = "ssh" needs hosts, got none; name them: hosts = "node1 node2"')
        files = [name for name in ("tls_ca_file", "tls_cert", "tls_key") if getattr(self, name)]
        if len(files) in (1, 2):
            raise ValueError(f"{files[0]}: tls_ca_file, tls_cert and tls_key go together, got {' and '.join(files)} alone; name all three")
        schedule(self.generations)
        if self.stages > 1:
            self._place_stages()

    def _place_stages(self) -> None:
        """Have as many ranks as stages. Raises ValueError for what is for replicas."""
        given = {"zero": self.zero, "generations": self.generations, 'wire = "bf16"': self.wire == "bf16"}
        if names := [name for name, value in given.items() if value]:
            raise ValueError(f"stages: {names[0]} is for ranks that each have the whole model; leave it out, or set stages = 0")
        if self.ranks not in (0, self.stages):
            raise ValueError(f"stages: each is one rank, got stages = {self.stages} and ranks = {self.ranks}; leave ranks out")
        object.__setattr__(self, "ranks", self.stages)

    @property
    def started(self) -> int:
        """Return how many workers are started; 0: none, or as many as mpiexec says."""
        return {"local": 1, "slurm": 1, "pbs": 1, "ssh": len(self.hosts.split())}.get(self.start, 0) * self.members

    @property
    def is_staged(self) -> bool:
        """True if ranks are stages of one model."""
        return self.stages > 1

    @property
    def where(self) -> str:
        """Return what messages call the cluster."""
        return self.address or self.scheduler_file or (f"{self.start} cluster" if self.start else "cluster")


def schedule(generations: str) -> list[tuple[int, int]]:
    """Return (first step, ranks) of each generation of `0x2 17x1 20x2`: from step 0 on 2 ranks, from 17 on 1. Raises ValueError."""
    found: list[tuple[int, int]] = []
    for word in generations.split():
        parts = re.fullmatch(r"(\d{1,15})x(\d{1,4})", word)
        if not parts or not 1 <= int(parts[2]) <= 4096:
            raise ValueError(f"generations: wanted STEPxRANKS, for example 0x2 17x1, got '{word[:40]}'")
        step = int(parts[1])
        if not found and step:
            raise ValueError(f"generations: the first one begins at step 0, got step {step}")
        if found and step <= found[-1][0]:
            raise ValueError(f"generations: wanted steps that rise, got {step} after {found[-1][0]}")
        found.append((step, int(parts[2])))
    return found


def full_address(address: str) -> str:
    """Return an address with its protocol: TCP unless it says another. Raises ValueError."""
    protocol, _, place = address.rpartition("://")
    protocol = (protocol or "tcp").lower()
    if protocol not in PROTOCOLS:
        raise ValueError(f"address: wanted one of {', '.join(PROTOCOLS)}, got {protocol[:40]}://")
    host, _, port = place.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or not 1 <= int(port) <= 65535 or re.search(r"[\s/@]", place):
        raise ValueError(f"address: wanted PROTOCOL://HOST:PORT, for example tcp://10.0.0.1:8786, got {address[:100]!r}")
    return f"{protocol}://{place}"
