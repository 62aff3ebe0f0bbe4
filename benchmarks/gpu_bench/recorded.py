"""Rollouts to train on without an engine, in the format of ``--save-debug-rollout-data``: random tokens and rewards.

``python -m gpu_bench.recorded DIRECTORY VOCABULARY ROLLOUTS PROMPTS ANSWERS TOKENS``.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

from gpu_bench.model import locked
from gpu_bench.rehearsal import is_rehearsal
from main_job_bench.processes import environment, python, run
from main_job_bench.workload import PAD_ID

ROLLOUTS, TOKENS = 4, 128


def recorded(out: Path, vocabulary: int) -> str:
    """The template for ``--load-debug-rollout-data``; the files are written unless they are there."""
    directory = out / f"recorded-{vocabulary}"
    prompts, answers, tokens = (4, 4, 16) if is_rehearsal() else (16, 8, TOKENS)
    numbers = [str(number) for number in (vocabulary, ROLLOUTS, prompts, answers, tokens)]
    with locked(out / "recorded.lock"):
        if not (directory / f"{ROLLOUTS - 1}.pt").exists():
            run(
                python("-m", "gpu_bench.recorded", str(directory), *numbers),
                env=environment(8), log_path=out / f"recorded-{vocabulary}.log", deadline_s=100.0,
            )  # fmt: skip
    return f"{directory}/{{rollout_id}}.pt"


def samples_of(rng: random.Random, rollout_id: int, vocabulary: int, sizes: tuple[int, int, int]) -> list[Any]:
    """Of one rollout. ``sizes``: prompts, answers to each, most tokens of an answer."""
    from miles.utils.types import Sample

    prompts, answers, most = sizes
    made = []
    for index in range(prompts * answers):
        prompt = [_token(rng, vocabulary) for _ in range(rng.randint(8, 24))]
        answer = [_token(rng, vocabulary) for _ in range(rng.randint(most // 2, most))]
        made.append(
            Sample(
                group_index=rollout_id * prompts + index // answers, index=rollout_id * prompts * answers + index,
                tokens=prompt + answer, response_length=len(answer), reward=rng.random(),
                rollout_log_probs=[-math.log(vocabulary)] * len(answer), status=Sample.Status.COMPLETED,
            )
        )  # fmt: skip
    return made


def _token(rng: random.Random, vocabulary: int) -> int:
    """Any but the padding's: its row of the embedding is zero, and a norm of zeros has a gradient that drowns all."""
    token = rng.randrange(vocabulary - 1)
    return token + (token >= PAD_ID)


def main(argv: list[str]) -> int:
    from miles.rollout.debug_data import save_rollout_data

    directory = Path(argv[0])
    vocabulary, rollouts, prompts, answers, tokens = map(int, argv[1:])
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for rollout_id in range(rollouts):
        samples = samples_of(rng, rollout_id, vocabulary, (prompts, answers, tokens))
        save_rollout_data(f"{directory}/{{rollout_id}}.pt", rollout_id, [[sample] for sample in samples], {})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
