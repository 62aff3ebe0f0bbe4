"""Whether an engine holds what the trainer exports (``--check-weight-update-equal``). Imports no torch.

"The same" is: the checksums of what it holds are those of what it loads from the export. Names are the engine's own:
SGLang joins some of the checkpoint's tensors (``qkv_proj``, ``gate_up_proj``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from miles.backends.sglang_utils.client import EngineClient
from miles_agents.errors import InternalError

logger = logging.getLogger(__name__)
_NAMES_SHOWN = 5
_told: set[str] = set()
Sums = list[dict[str, str]]
"""By rank, then by parameter."""


class WeightsDiffer(InternalError):
    """After a weight update an engine does not hold what the trainer exports."""

    code = "E-ENG-008"


async def check_engine(client: EngineClient, export: Path | str, *, version: int, skip: Sequence[str] = ()) -> None:
    """Check that an engine holds what it loads from this Hugging Face directory, which it does for that.

    Args:
        version: How its weights are called afterwards.
        skip: Parameters with one of these in their names are not compared.

    Raises:
        WeightsDiffer: Both checksums, and the first parameters that differ.
    """
    sum_held, held = await client.checksums()
    await client.update_weights_from_disk(str(export), version=version)
    sum_loaded, loaded = await client.checksums()
    if sum_held != sum_loaded:
        differing = _differing(held, loaded, skip)
        if differing or not skip:
            raise _differ(client.name, (sum_held, sum_loaded), differing)
    logger.info("%s holds weight version %s, checksum %s", client.name, version, sum_held)
    names = {name for rank in loaded for name in rank}
    if unused := [word for word in skip if word not in _told and not any(word in name for name in names)]:
        _told.update(unused)
        logger.warning("--check-weight-update-skip-list: no parameter of %s has %s in its name", client.name, unused)


def _differing(held: Sums, loaded: Sums, skip: Sequence[str]) -> list[str]:
    return [
        f"rank {rank} {name}: {ours.get(name)}, from disk {theirs.get(name)}"
        for rank, (ours, theirs) in enumerate(zip(held, loaded, strict=True))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and not any(word in name for word in skip)
    ]


def _differ(name: str, sums: tuple[str, str], differing: list[str]) -> WeightsDiffer:
    more = f"\n... and {len(differing) - _NAMES_SHOWN} more" if len(differing) > _NAMES_SHOWN else ""
    return WeightsDiffer(
        f"{name} does not hold the trainer's weights",
        evidence=f"checksum {sums[0]}, after loading the export from disk {sums[1]}\n"
        + "\n".join(differing[:_NAMES_SHOWN])
        + more,
        advice="Report it with the lines above, the model's config.json and the parallel sizes.",
        engine=name,
    )
