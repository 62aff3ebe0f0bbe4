"""TRL's GRPOTrainer on the same model, prompts and lengths, in one process. Started by ``trl_child``.

Arguments: the directory that ``workload`` wrote, JSON of ``Size``, the number of threads, the file that results go to,
a directory for TRL's own files. Results are one JSON object a line: ``started`` (seconds since the epoch), then one for
each iteration.

What is measured is TRL as it comes, with transformers' ``generate``. Added are clocks, and a logits processor that ends
each answer after the tokens that its prompt's row asks for: TRL knows one length for all.
"""

from __future__ import annotations

import importlib
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)

from main_job_bench.sizes import Size
from main_job_bench.workload import EOS_ID, MODEL_DIR, PROMPTS

trl: Any = importlib.import_module("trl")  # its annotations are for people

GENERATION, LOG_PROBS, TRAINING, REWARD = "generation", "log_probs", "training", "reward"


class Clocks:
    """Seconds by part, since the last iteration was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generating = False
        self.tokens = 0
        self._parts: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        self._parts[part] += seconds

    def write(self, content: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(content) + "\n")

    def start(self) -> None:
        self.write({"started": time.time()})
        self._began = time.perf_counter()

    def iteration(self, samples: int) -> None:
        """All steps of an iteration are done."""
        now = time.perf_counter()
        parts = dict(self._parts)
        parts[TRAINING] -= sum(parts.get(part, 0.0) for part in (GENERATION, LOG_PROBS, REWARD))
        self.write({"wall": now - self._began, "samples": samples, "tokens": self.tokens, "parts": parts})
        self._parts.clear()
        self.tokens, self._began = 0, now


class EndAt(LogitsProcessor):
    """Forbids the end before an answer's last token, and all else there."""

    def __init__(self, lengths: torch.Tensor, prompt_length: int) -> None:
        self.lengths, self.prompt_length = lengths, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt_length + 1
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, EOS_ID] = torch.where(ends, 0.0, -torch.inf)
        return scores


class Watch(TrainerCallback):
    """Clocks the optimizer, and ends iterations."""

    def __init__(self, clocks: Clocks, size: Size) -> None:
        self.clocks, self.size = clocks, size
        self._optimizer_began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clocks.start()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._optimizer_began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.clocks.add(TRAINING, time.perf_counter() - self._optimizer_began)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.size.steps == 0:
            self.clocks.iteration(self.size.samples)


def main(argv: list[str]) -> int:
    directory, size, num_threads = Path(argv[0]), Size.from_json(json.loads(argv[1])), int(argv[2])
    torch.set_num_threads(num_threads)
    clocks = Clocks(Path(argv[3]))
    path = str(directory / MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    rows = [json.loads(line) for line in (directory / PROMPTS).read_text().splitlines()]
    watch_generation(model, clocks, {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in rows})
    watch_log_probs(model, clocks)

    def reward(completions: list[str], **_: Any) -> list[float]:
        began = time.perf_counter()
        rewards = [float(random.random() < 0.5) for _ in completions]  # as --rm-type random
        clocks.add(REWARD, time.perf_counter() - began)
        return rewards

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(size, Path(argv[4])),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Watch(clocks, size)],
    )
    watch_steps(trainer, clocks)
    trainer.train()
    return 0


def settings(size: Size, directory: Path) -> Any:
    """As ours: GRPO's loss, no KL, float32, no recomputation; one generation serves all steps of an iteration."""
    return trl.GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=size.num_rollouts * size.steps,
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.batch // size.micro_batch,
        steps_per_generation=size.samples // size.micro_batch,
        num_generations=size.group,
        max_completion_length=size.longest,
        shuffle_dataset=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=0,
    )


def watch_generation(model: Any, clocks: Clocks, rows: dict[tuple[int, ...], dict[str, Any]]) -> None:
    """Clock the model's ``generate``, and give each answer its length."""
    generate = model.generate

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
        seen: Counter[tuple[int, ...]] = Counter()
        lengths = []
        for prompt in (tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)):
            lengths.append(rows[prompt]["metadata"]["lengths"][seen[prompt]])
            seen[prompt] += 1
        clocks.tokens += sum(lengths)
        clocks.generating = True
        processors = LogitsProcessorList([EndAt(torch.tensor(lengths), ids.shape[1])])
        made = generate(*args, logits_processor=processors, **kwargs)
        clocks.generating = False
        check(made[:, ids.shape[1] :], lengths)
        clocks.add(GENERATION, time.perf_counter() - began)
        return made

    model.generate = measured


def check(answers: torch.Tensor, lengths: list[int]) -> None:
    """Each answer ends where it should."""
    ends = (answers == EOS_ID).int().argmax(dim=1) + 1
    if ends.tolist() != lengths:
        raise AssertionError(f"answers have {ends.tolist()} tokens, not {lengths}")


def watch_steps(trainer: Any, clocks: Clocks) -> None:
    """Clock what happens in a step before the optimizer's: generation, if it is due, forward and backward."""
    step = trainer.training_step

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        loss = step(*args, **kwargs)
        clocks.add(TRAINING, time.perf_counter() - began)
        return loss

    trainer.training_step = measured


def watch_log_probs(model: Any, clocks: Clocks) -> None:
    """Clock passes without gradient that are no generation: the log-probs of the policy that generated."""
    began = [0.0]

    def before(*_: Any) -> None:
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        if not torch.is_grad_enabled() and not clocks.generating:
            clocks.add(LOG_PROBS, time.perf_counter() - began[0])

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)
