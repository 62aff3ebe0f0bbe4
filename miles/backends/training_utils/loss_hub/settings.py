"""The flags that losses read, typed and checked once; and the refusal of those that are not built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles.backends.training_utils.loss_hub.math_utils import KL_TYPES
from miles_agents.errors import ConfigError

LOSS_TYPES = ("policy_loss", "sft_loss", "custom_loss")
ESTIMATORS = (
    "grpo",
    "gspo",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "on_policy_distillation",
)


class UnsupportedLoss(ConfigError):
    """A flag asks for a loss or an advantage that there is not, or that contradicts another flag."""

    code = "E-TRAIN-003"


@dataclass(frozen=True)
class LossSettings:
    """The flags of these names; ``--help`` says what each does. ``eps_clip_c`` None: no dual clip. ``vocab_size``:
    columns of the logits from there on are padding."""

    loss_type: str
    eps_clip: float
    eps_clip_high: float
    eps_clip_c: float | None
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    use_unbiased_kl: bool
    entropy_coef: float
    per_token: bool
    temperature: float
    vocab_size: int | None
    chunk_size: int
    use_rollout_log_probs: bool
    skip_actor_forward_only: bool
    use_tis: bool
    get_mismatch_metrics: bool
    recompute: bool
    observe_entropy: bool
    per_sequence: bool
    use_opsm: bool
    opsm_delta: float
    value_clip: float
    mtp_factor: float

    @classmethod
    def from_args(cls, args: Any) -> LossSettings:
        """Read and check.

        Raises:
            UnsupportedLoss: Names the flag.
        """
        _refuse(args)
        eps_clip = float(getattr(args, "eps_clip", 0.2))
        high = getattr(args, "eps_clip_high", None)
        temperature = getattr(args, "rollout_temperature", 1.0)
        return cls(
            loss_type=getattr(args, "loss_type", "policy_loss"),
            eps_clip=eps_clip,
            eps_clip_high=eps_clip if high is None else float(high),
            eps_clip_c=getattr(args, "eps_clip_c", None),
            use_kl_loss=_flag(args, "use_kl_loss"),
            kl_loss_coef=float(getattr(args, "kl_loss_coef", 0.0) or 0.0),
            kl_loss_type=getattr(args, "kl_loss_type", "k1"),
            use_unbiased_kl=_flag(args, "use_unbiased_kl"),
            entropy_coef=float(getattr(args, "entropy_coef", 0.0) or 0.0),
            per_token=_flag(args, "calculate_per_token_loss"),
            temperature=1.0 if temperature is None else float(temperature),
            vocab_size=(getattr(args, "hf_config", None) or {}).get("vocab_size"),
            chunk_size=int(getattr(args, "log_probs_chunk_size", None) or -1),
            use_rollout_log_probs=_flag(args, "use_rollout_logprobs"),
            skip_actor_forward_only=_flag(args, "skip_actor_forward_only"),
            use_tis=_flag(args, "use_tis"),
            get_mismatch_metrics=_flag(args, "get_mismatch_metrics"),
            recompute=_flag(args, "recompute_loss_function"),
            observe_entropy=_flag(args, "observe_training_entropy"),
            per_sequence=getattr(args, "advantage_estimator", "grpo") == "gspo",
            use_opsm=_flag(args, "use_opsm"),
            opsm_delta=float(getattr(args, "opsm_delta", None) or 0.0),
            value_clip=float(getattr(args, "value_clip", 0.2)),
            mtp_factor=float(getattr(args, "mtp_loss_scaling_factor", 0.2)),
        )

    @property
    def needs_old_log_probs(self) -> bool:
        """A pass without gradient before training: the denominator of the ratio, and the distance to the engine."""
        return self.loss_type != "sft_loss" and not self.use_rollout_log_probs and not self.skip_actor_forward_only


@dataclass(frozen=True)
class AdvantageSettings:
    """The flags of these names; ``old_column``: log-probs of the policy that generated."""

    estimator: str
    kl_coef: float
    kl_loss_type: str
    gamma: float
    lambd: float
    use_opd: bool
    opd_kl_coef: float
    old_column: str

    @classmethod
    def from_args(cls, args: Any) -> AdvantageSettings:
        """Read."""
        estimator = getattr(args, "advantage_estimator", "grpo")
        coef = getattr(args, "opd_kl_coef", None)
        return cls(
            estimator=estimator,
            kl_coef=float(getattr(args, "kl_coef", 0.0) or 0.0),
            kl_loss_type=getattr(args, "kl_loss_type", "k1"),
            gamma=_number(args, "gamma"),
            lambd=_number(args, "lambd"),
            use_opd=_flag(args, "use_opd") or estimator == "on_policy_distillation",
            opd_kl_coef=1.0 if coef is None else float(coef),
            old_column="rollout_log_probs" if _flag(args, "use_rollout_logprobs") else "log_probs",
        )


def _number(args: Any, name: str) -> float:
    value = getattr(args, name, None)
    return 1.0 if value is None else float(value)


def needs_reference(args: Any) -> bool:
    """Log-probabilities of the reference model are needed."""
    if getattr(args, "loss_type", "policy_loss") == "sft_loss":
        return False
    return _flag(args, "use_kl_loss") or bool(getattr(args, "kl_coef", 0.0))


def moves_reference(args: Any) -> bool:
    """The reference model becomes the actor from time to time (``--ref-update-interval``)."""
    return needs_reference(args) and getattr(args, "ref_update_interval", None) is not None


def keeps_old_actor(args: Any) -> bool:
    """Old log-probs are of the weights that generated (``--keep-old-actor``)."""
    return LossSettings.from_args(args).needs_old_log_probs and _flag(args, "keep_old_actor")


def needs_teacher(args: Any) -> bool:
    """Log-probabilities of a teacher are computed here (``--opd-type megatron``)."""
    if getattr(args, "loss_type", "policy_loss") == "sft_loss" or getattr(args, "opd_type", None) != "megatron":
        return False
    return AdvantageSettings.from_args(args).use_opd


def _flag(args: Any, name: str) -> bool:
    return bool(getattr(args, name, False))


def _refuse(args: Any) -> None:
    loss_type = getattr(args, "loss_type", "policy_loss")
    if loss_type not in LOSS_TYPES:
        raise _unsupported("--loss-type", loss_type, f"Choose one of {', '.join(LOSS_TYPES)}.")
    estimator = getattr(args, "advantage_estimator", "grpo")
    if loss_type != "sft_loss" and estimator not in ESTIMATORS:
        raise _unsupported("--advantage-estimator", estimator, f"Choose one of {', '.join(ESTIMATORS)}.")
    kl_type = getattr(args, "kl_loss_type", "k1")
    if kl_type not in KL_TYPES:
        raise _unsupported("--kl-loss-type", kl_type, f"Choose one of {', '.join(KL_TYPES)}.")
    constant = getattr(args, "eps_clip_c", None)
    if constant is not None and constant <= 1:
        raise _unsupported("--eps-clip-c", constant, "Give a number above 1, or leave it out.")
    if loss_type == "custom_loss" and not getattr(args, "custom_loss_function_path", None):
        raise _unsupported("--loss-type", loss_type, "Give --custom-loss-function-path, too.")
    if _flag(args, "use_tis") and _flag(args, "use_rollout_logprobs"):
        raise _unsupported("--use-tis", True, "Leave out --use-rollout-logprobs: with it there is nothing to correct.")


def _unsupported(flag: str, value: Any, advice: str) -> UnsupportedLoss:
    return UnsupportedLoss(f"{flag} {value} cannot be trained with", evidence=f"{flag} is {value!r}", advice=advice)
