"""``Sample``: one prompt and what a model made of it. User code reads and writes it; it never leaves its process."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from miles_agents.errors import ConfigError

RolloutBatch: TypeAlias = dict[str, Any]
"""Train data by column: one entry per sample in each list."""


class BadSample(ConfigError):
    """The parts of a sample do not fit each other."""

    code = "E-ROLL-003"


@dataclass(frozen=True)
class AdapterRef:
    """The LoRA adapter that a sample is generated with."""

    name: str
    slot: int


@dataclass(frozen=True)
class RewardSpec:
    """A sample's own reward, in place of the one that the flags name."""

    rm_type: str | None = None
    custom_rm_path: str | None = None


@dataclass(frozen=True)
class ParamInfo:
    """A model parameter as it is announced: name, dtype, shape, attributes, bytes, and the rank that has it."""

    name: str
    dtype: Any
    shape: Any
    attrs: dict[str, Any]
    size: int
    src_rank: int


@dataclass(frozen=True)
class MultimodalType:
    """A kind of media and what stands for it in a prompt."""

    name: str
    placeholder: str


class MultimodalTypes:
    """The kinds of media."""

    IMAGE = MultimodalType("image", "<image>")
    VIDEO = MultimodalType("video", "<video>")
    AUDIO = MultimodalType("audio", "<audio>")

    @classmethod
    def all(cls) -> list[MultimodalType]:
        """All of them."""
        return [cls.IMAGE, cls.VIDEO, cls.AUDIO]

    @classmethod
    def get(cls, name: str) -> MultimodalType | None:
        """The one of this name."""
        return next((kind for kind in cls.all() if kind.name == name), None)


class SampleStatus(Enum):
    """Where a sample is. ``ABORTED`` ones are not ready for training, whatever they hold."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class SpeculativeInfo:
    """Sums of speculative decoding over a sample's requests."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        """Accepted drafts over drafts."""
        return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

    @property
    def spec_accept_length(self) -> float:
        """Tokens per verification."""
        return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Add one response's numbers."""
        self.spec_accept_token_num += int(meta_info.get("spec_accept_token_num", 0))
        self.spec_draft_token_num += int(meta_info.get("spec_draft_token_num", 0))
        self.spec_verify_ct += int(meta_info.get("spec_verify_ct", 0))
        self.completion_token_num += int(meta_info.get("completion_tokens", 0))


@dataclass
class CacheInfo:
    """Sums of prefix caching over a sample's requests."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Cached prompt tokens over prompt tokens."""
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Add one response's numbers."""
        self.cached_tokens += int(meta_info.get("cached_tokens", 0) or 0)
        self.total_prompt_tokens += int(meta_info.get("prompt_tokens", 0) or 0)


@dataclass
class Sample:
    """One prompt, its response, and what is known of both.

    Attributes:
        group_index: Of the prompt; samples of one prompt share it.
        index: Of the sample, unique in the run.
        rollout_id: Of the execution; the samples that one made (sub-agents, compaction) share it. None: ``index``.
        prompt: Text, or a list of messages.
        tokens: Token ids of prompt and response.
        response_length: Response tokens; the last ones of ``tokens``.
        reward: A number, or a dict of them (``--reward-key`` chooses).
        loss_mask: 0 or 1 per response token; None: all 1.
        weight_versions: One per request that was answered; of one during which weights changed, each version that made
            tokens of it, oldest first.
        rollout_log_probs: The engine's, per response token.
        remove_sample: Its loss mask becomes 0.
        train_metadata: Shipped to the trainer as ``metadata``.
        routing_key: Sent to the router as ``X-SMG-Routing-Key``.
        non_generation_time: Seconds of tools and the like.
    """

    Status = SampleStatus
    SpecInfo = SpeculativeInfo
    PrefixCacheInfo = CacheInfo

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    rollout_routed_experts: np.ndarray[Any, Any] | None = None
    rollout_indexer_topk: np.ndarray[Any, Any] | None = None
    remove_sample: bool = False
    teacher_log_probs: list[float] | None = None
    opd_reverse_kl: list[float] | None = None
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    adapter: AdapterRef | None = None
    reward_spec: RewardSpec | None = None
    routing_key: str | None = None
    non_generation_time: float = 0.0
    spec_info: SpeculativeInfo = field(default_factory=SpeculativeInfo)
    prefix_cache_info: CacheInfo = field(default_factory=CacheInfo)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, those that user code added too; the status as its value. Not a deep copy."""
        return {
            **vars(self),
            "status": self.status.value,
            "spec_info": asdict(self.spec_info),
            "prefix_cache_info": asdict(self.prefix_cache_info),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Inverse of ``to_dict``. Keys that are no fields become attributes."""
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in data.items() if key in known}
        for name, kind in (
            ("spec_info", SpeculativeInfo),
            ("prefix_cache_info", CacheInfo),
            ("adapter", AdapterRef),
            ("reward_spec", RewardSpec),
        ):
            if isinstance(given.get(name), dict):
                given[name] = kind(**given[name])
        if "status" in given:
            given["status"] = SampleStatus(given["status"])
        sample = cls(**given)
        vars(sample).update({key: value for key, value in data.items() if key not in known})
        return sample

    def get_reward_value(self, args: Any) -> Any:
        """The reward, or its entry ``--reward-key``."""
        if not args.reward_key:
            return self.reward
        if not isinstance(self.reward, dict) or args.reward_key not in self.reward:
            raise BadSample(
                f"the reward of sample {self.index} has no entry {args.reward_key!r}",
                evidence=f"the reward is {str(self.reward)[:200]}",
                advice="Give --reward-key a key that the reward function returns, or none for a plain number.",
            )
        return self.reward[args.reward_key]

    @property
    def effective_response_length(self) -> int:
        """Response tokens that count for the loss."""
        return sum(self.loss_mask) if self.loss_mask is not None else self.response_length

    @property
    def oldest_weight_version(self) -> int | None:
        """The smallest weight version that made a token of it; None if no version is a number."""
        numbers = [int(version) for version in self.weight_versions if str(version).isdigit()]
        return min(numbers) if numbers else None

    def validate(self) -> None:
        """Check that lengths fit each other.

        Raises:
            BadSample: they do not.
        """
        if not 0 <= self.response_length <= len(self.tokens):
            self._refuse(f"response_length is {self.response_length}, with {len(self.tokens)} tokens in all")
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs", "opd_reverse_kl"):
            value = getattr(self, name)
            if value is not None and len(value) != self.response_length:
                self._refuse(f"{name} has {len(value)} entries, response_length is {self.response_length}")
        for name in ("rollout_routed_experts", "rollout_indexer_topk"):
            value = getattr(self, name)
            # Media placeholders expand in the engine: then there are more rows than tokens here.
            if value is not None and len(value) < len(self.tokens) - 1:
                self._refuse(f"{name} has {len(value)} rows, there are {len(self.tokens)} tokens")

    def _refuse(self, evidence: str) -> None:
        raise BadSample(
            f"sample {self.index} of prompt group {self.group_index} does not fit together",
            evidence=evidence,
            advice="Let the generate function keep tokens, response_length, loss_mask and log-probs in step.",
        )

    def strip_last_output_tokens(self, n: int, tokenizer: Any) -> None:
        """Take the last ``n`` response tokens away, and what belongs to them."""
        if n <= 0:
            return
        n = min(n, self.response_length)
        self.tokens = self.tokens[: len(self.tokens) - n]
        self.response_length -= n
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs", "opd_reverse_kl"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[: self.response_length])
        for name in ("rollout_routed_experts", "rollout_indexer_topk"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[: max(0, len(self.tokens) - 1)])
        kept = self.tokens[len(self.tokens) - self.response_length :] if self.response_length else []
        self.response = tokenizer.decode(kept) if kept else ""

    def reset_for_retry(self) -> None:
        """Forget all that was generated. The status is ``ABORTED`` until it is generated again."""
        fresh = Sample()
        for name in (
            "tokens", "multimodal_train_inputs", "response", "response_length", "reward", "loss_mask",
            "weight_versions", "rollout_log_probs", "rollout_routed_experts", "rollout_indexer_topk",
            "remove_sample", "teacher_log_probs", "opd_reverse_kl", "non_generation_time", "spec_info",
            "prefix_cache_info",
        ):  # fmt: skip
            setattr(self, name, copy.copy(getattr(fresh, name)))
        self.status = SampleStatus.ABORTED

    def update_from_meta_info(self, args: Any, meta_info: dict[str, Any]) -> None:
        """Take over what an engine's response says: statistics, weight version, finish reason."""
        if meta_info.get("spec_verify_ct"):
            self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        # An answer that was under way while weights changed has tokens of several versions.
        spans = meta_info.get("weight_versions") or ()
        last = [{"version": meta_info["weight_version"]}] if meta_info.get("weight_version") is not None else []
        self.weight_versions += [str(span["version"]) for span in spans or last]
        reason = str((meta_info.get("finish_reason") or {}).get("type"))
        found = {
            "length": SampleStatus.TRUNCATED,
            "abort": SampleStatus.ABORTED,
            "stop": SampleStatus.COMPLETED,
        }.get(reason)
        if found is not None:
            self.status = found
