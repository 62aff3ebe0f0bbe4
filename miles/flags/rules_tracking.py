"""Rules: trackers have what they need before anything starts."""

from __future__ import annotations

from urllib.parse import urlsplit

from miles.flags.draft import Draft
from miles.tracking.trackers import KINDS, chosen

_LOOPBACK = ("127.", "::1", "localhost")


def resolve_tracking(draft: Draft) -> None:
    """Which trackers there are, and whether each can begin."""
    if draft["tensorboard_dir"] and not draft["use_tensorboard"]:
        # With the profiler, the directory may be meant for its traces alone.
        draft["use_tensorboard"] = not (draft["use_pytorch_profiler"] and "tensorboard" in draft.facts.tracking.missing)
    _resolve_wandb(draft)
    for name in chosen(draft.values):
        kind = KINDS[name]
        if missing := draft.facts.tracking.missing.get(name):
            dest = (
                "tensorboard_dir" if name == "tensorboard" and "use_tensorboard" not in draft.typed else f"use_{name}"
            )
            draft.problem(
                dest,
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
                advice=f"Install what it needs: pip install 'miles[{kind.extra}]'; or leave it out.",
            )
    _check_mlflow(draft)
    _resolve_prometheus(draft)
    _check_metric_checker(draft)


def _resolve_wandb(draft: Draft) -> None:
    facts = draft.facts.tracking
    if not draft["use_wandb"]:
        return
    mode = draft["wandb_mode"] or facts.variables.get("WANDB_MODE") or "online"
    if mode == "disabled":
        draft["use_wandb"] = False
        draft.notice("Weights & Biases records nothing: its mode is disabled")
        return
    if mode == "online" and not facts.has_wandb_key:
        draft.problem(
            "use_wandb",
            "no API key is known: neither WANDB_API_KEY is set, nor has `wandb login` left one",
            advice="Set WANDB_API_KEY, or run `wandb login`, or keep the run here with --wandb-mode offline.",
        )
    if "wandb_key" in draft.typed:
        draft.notice(
            f"{draft.flag('wandb_key')}: the key is kept out of files, logs and other processes, but shells remember "
            "command lines; WANDB_API_KEY or `wandb login` keep it to yourself"
        )


def _check_mlflow(draft: Draft) -> None:
    uri = draft["mlflow_tracking_uri"] or draft.facts.tracking.variables.get("MLFLOW_TRACKING_URI")
    if draft["use_mlflow"] and uri and urlsplit(uri).scheme in {"", "file"}:
        draft.problem(
            "mlflow_tracking_uri" if draft["mlflow_tracking_uri"] else "use_mlflow",
            "MLflow's directories of files are no longer maintained, and cannot hold both eval/x and eval/x/y",
            allowed="http(s)://..., sqlite:////path/to/mlflow.db or another database",
            advice="Give a server or a database; without it, the run directory gets a database.",
            value=uri,
        )


def _resolve_prometheus(draft: Draft) -> None:
    if not draft["use_prometheus"]:
        return
    facts, dest = draft.facts.tracking, "prometheus_port"
    named = facts.variables.get("PROMETHEUS_PORT")
    if dest not in draft.typed and named is not None:
        if not named.isdigit():
            draft.problem(dest, "PROMETHEUS_PORT is no number", advice="Correct the variable.", value=named)
            return
        draft[dest] = int(named)
    if draft[dest] > 65535:
        draft.problem(dest, "there is no such port", allowed="0 to 65535", advice="Give another one; 0 is a free one.")
    elif facts.port_error:
        draft.problem(
            dest if facts.port_error.count("in use") else "prometheus_address",
            f"it cannot be listened on: {facts.port_error}",
            advice="Give another one; port 0 is a free one.",
        )
    address = str(draft["prometheus_address"])
    if not address.startswith(_LOOPBACK):
        draft.notice(f"--prometheus-address {address}: whoever reaches it can read the metrics, without a password")


def _check_metric_checker(draft: Draft) -> None:
    key, threshold = "ci_metric_checker_key", "ci_metric_checker_threshold"
    if (draft[key] is None) == (draft[threshold] is None):
        if draft[key] is not None and draft["eval_interval"] is None:
            draft.problem(key, "nothing is evaluated", advice="Give --eval-interval, or leave it out.")
        return
    given, other = (key, threshold) if draft[threshold] is None else (threshold, key)
    draft.problem(given, f"it needs {draft.flag(other)}", advice="Give both, or none.")
