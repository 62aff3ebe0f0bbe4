"""Rules: the machines of a run, and who starts an agent on each."""

from __future__ import annotations

from miles.flags.draft import Draft
from miles.flags.hosts import Host, HostProblem, parse_hostfile, parse_hosts

HAND_S = 3600.0
"""Default of ``--start-timeout`` where a person, or somebody else's scheduler, starts the agents."""


def resolve_nodes(draft: Draft) -> None:
    """``launcher``; ``machines``, a dict for each (``hosts.Host``); ``num_nodes``, None where that is not known yet."""
    hosts = _hosts(draft)
    named = "hosts" if draft["hosts"] else "hostfile"
    launcher = draft["launcher"] = draft["launcher"] or _launcher(draft)
    if draft["nodes"] is not None and (launcher != "external" or draft["hosts"] or draft["hostfile"]):
        draft.problem(
            "nodes", "it is for --launcher external without names of machines", advice="Leave it out, or the names."
        )
    if launcher == "ssh" and not (draft["hosts"] or draft["hostfile"]):
        draft.problem("launcher", "no machine is named", advice="Give --hosts or --hostfile.")
    if launcher in ("local", "slurm") and (draft["hosts"] or draft["hostfile"]):
        whose = "this machine alone" if launcher == "local" else "the machines of the allocation"
        draft.problem(
            named, f"--launcher {launcher} is {whose}", advice="Leave --launcher out, or give --launcher ssh."
        )
    if launcher == "slurm":
        hosts = _allocated(draft)
    if launcher == "external":
        hosts = hosts or [Host(f"node-{number}", f"node-{number}") for number in range(draft["nodes"] or 1)]
        if "start_timeout" not in draft.typed:
            draft["start_timeout"] = HAND_S
    draft["machines"] = [host.as_dict() for host in hosts]
    draft["num_nodes"] = 1 if launcher == "local" else len(hosts)


def _launcher(draft: Draft) -> str:
    """The one that is meant if none is named."""
    if draft["hosts"] or draft["hostfile"]:
        return "ssh"
    slurm = draft.facts.slurm
    if slurm.nodes and slurm.nodes != (slurm.here,):
        draft.notice(f"--launcher is slurm: this is job {slurm.job}, with {len(slurm.nodes)} nodes")
        return "slurm"
    return "local"


def _allocated(draft: Draft) -> list[Host]:
    slurm = draft.facts.slurm
    if not slurm.nodes:
        draft.problem(
            "launcher",
            slurm.error or "this is no Slurm allocation: SLURM_JOB_ID and SLURM_JOB_NODELIST are not set",
            advice="Start it with miles submit, from a job script, or in a shell of salloc.",
        )
    return [Host(name, name, slots=slurm.gpus_of(name)) for name in slurm.nodes]


def is_remote(draft: Draft) -> bool:
    """Models run on other machines than this one, as far as flags tell."""
    return bool(draft["launcher"] != "local")


def slots_of(draft: Draft) -> list[int | None]:
    """What each machine offers, as far as flags tell; None: that is found when its agent joins."""
    given = draft["num_gpus_per_node"]
    return [machine["slots"] or given for machine in draft["machines"]]


def _hosts(draft: Draft) -> list[Host]:
    if draft["hosts"] and draft["hostfile"]:
        draft.problem("hostfile", "--hosts names machines, too", advice="Give one of the two.")
        return []
    if draft["hosts"]:
        hosts, problems = parse_hosts(draft["hosts"])
        _tell(draft, "hosts", problems, "such as node[1-4],alice@other:2222")
        return hosts
    if not draft["hostfile"]:
        return []
    text, error = draft.facts.hostfile
    if error:
        draft.problem("hostfile", error, allowed="a file of machines", advice="Correct the path.")
        return []
    hosts, problems = parse_hostfile(text)
    _tell(draft, "hostfile", problems, "lines such as: node-1 slots=8")
    return hosts


def _tell(draft: Draft, dest: str, problems: list[HostProblem], allowed: str) -> None:
    shown = problems[:10]
    more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    if problems:
        what = "; ".join(map(str, shown)) + more
        draft.problem(dest, what, allowed=allowed, advice="Correct it: docs/clusters.md has the formats.")
