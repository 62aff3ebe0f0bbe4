"""Rules: ``--rollout-external``, engines that somebody else has started."""

from __future__ import annotations

from urllib.parse import urlsplit

from miles.flags.draft import Draft

ADDRS = "rollout_external_engine_addrs"
_NOT_WITH = {
    "colocate": "engines of somebody else share no GPU with the trainer: weights reach them by broadcast only",
    "offload_rollout": "engines of somebody else keep their memory",
    "prefill_num_servers": "all engines are those of --rollout-external-engine-addrs",
}


def resolve_external(draft: Draft) -> None:
    """Addresses become ``host:port``, each once; what needs engines of ours is refused."""
    if not draft["rollout_external"] or not draft.generates:
        return
    for dest, why in _NOT_WITH.items():
        if draft.values.get(dest):
            draft.problem(
                dest,
                f"it cannot be combined with --rollout-external: {why}",
                advice=f"Leave out {draft.flag(dest)} or --rollout-external.",
            )
            draft[dest] = None
    if draft["device"] == "cuda" and draft["check_weight_update_equal"]:
        draft.notice("--check-weight-update-equal has external engines load an export: they must see --run-dir")
    given = draft[ADDRS]
    if not given:
        draft.problem(
            "rollout_external",
            "there is no engine to use",
            allowed="--rollout-external-engine-addrs HOST:PORT ...",
            advice="Give --rollout-external-engine-addrs.",
        )
        return
    addresses = []
    for address in given:
        plain = plain_address(str(address))
        if not plain:
            draft.problem(
                ADDRS,
                "is no address",
                value=str(address),
                allowed="HOST:PORT",
                advice="Give host and port of the engine's HTTP server, such as 10.0.0.7:30000.",
            )
        elif plain in addresses:
            draft.problem(ADDRS, "is given twice", value=str(address), advice="Give each engine once.")
        else:
            addresses.append(plain)
    draft[ADDRS] = addresses
    for dest in ("rollout_num_gpus", "rollout_num_gpus_per_engine"):
        if dest in draft.typed:
            draft.notice(f"{draft.flag(dest)} has no effect with --rollout-external: the engines run already")


def plain_address(address: str) -> str:
    """``host:port`` of an address with or without ``http://``; empty: it is none. IPv6 stands in brackets."""
    parts = urlsplit(address if "//" in address else f"http://{address}")
    try:
        port = parts.port
    except ValueError:
        return ""
    host = parts.hostname or ""
    if parts.scheme != "http" or not host or not port or parts.path not in ("", "/") or parts.query or parts.username:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
