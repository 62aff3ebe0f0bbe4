"""Rules: the machines of a run, and who starts an agent on each."""

from __future__ import annotations

from miles.flags.draft import Draft
from miles.flags.hosts import Host, HostProblem, parse_hostfile, parse_hosts


def resolve_nodes(draft: Draft) -> None:
    """``launcher``; ``machines``, a dict for each (``hosts.Host``); ``num_nodes``, None where that is not known yet."""
    hosts = _hosts(draft)
    draft["machines"] = [host.as_dict() for host in hosts]
    named = "hosts" if draft["hosts"] else "hostfile"
    launcher = draft["launcher"] or ("ssh" if draft["hosts"] or draft["hostfile"] else "local")
    draft["launcher"] = launcher
    if launcher == "ssh" and not (draft["hosts"] or draft["hostfile"]):
        draft.problem("launcher", "no machine is named", advice="Give --hosts or --hostfile.")
    if launcher == "local" and hosts:
        draft.problem(
            named, "--launcher local is this machine alone", advice="Leave --launcher out, or give --launcher ssh."
        )
    draft["num_nodes"] = len(hosts) if launcher == "ssh" else 1


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
