"""Flags: the loss and what goes into it."""

from __future__ import annotations

from miles.flags.flag import Flag, grouped, integer, number, off, path, refused, switch, text

GROUP = "algorithm"
TOP_K = "not built yet: distillation over several tokens of a position; the sampled one is compared"
INDEXER = "not built yet: models with a sparse attention's indexer"
ESTIMATORS = (
    "grpo",
    "gspo",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "on_policy_distillation",
)

FLAGS: tuple[Flag, ...] = (
    *grouped(
        GROUP,
        "contract",
        text("--advantage-estimator", "grpo", "how rewards become advantages of tokens", choices=ESTIMATORS),
        switch("--use-kl-loss", "KL divergence from the reference model in the loss"),
        number("--kl-loss-coef", 0.0, "its weight (0: only watched)"),
        text("--kl-loss-type", "k1", "its estimator", choices=("k1", "k2", "k3", "low_var_kl")),
        number("--entropy-coef", 0.0, "weight of the entropy bonus"),
        number("--eps-clip", 0.2, "lower clip of the ratio"),
        number("--eps-clip-high", None, "upper clip of the ratio (unset: --eps-clip)"),
        switch("--use-tis", "weigh losses by the distance between trainer and engine (truncated importance sampling)"),
        switch("--use-routing-replay", "training gives tokens to the experts of the pass over old log-probs"),
        switch("--use-rollout-routing-replay", "both passes give tokens to the experts that engines gave them to"),
        switch("--calculate-per-token-loss", "mean over tokens, not over samples"),
        off(
            "--no-check-for-nan-in-loss-and-grad",
            "check_for_nan_in_loss_and_grad",
            "take steps whose loss or gradient is not finite, too",
        ),
        switch(
            "--true-on-policy-mode", "samples with tokens of older weights are generated again; deterministic numerics"
        ),
    ),
    *grouped(
        GROUP,
        "reference",
        text("--loss-type", "policy_loss", "the loss", choices=("policy_loss", "sft_loss", "custom_loss")),
        number("--eps-clip-c", None, "dual clip: bound of the ratio where advantages are negative (above 1)"),
        off("--disable-grpo-std-normalization", "grpo_std_normalization", "do not divide by the group's deviation"),
        off("--disable-rewards-normalization", "rewards_normalization", "advantages are the rewards themselves"),
        off(
            "--disable-compute-advantages-and-returns",
            "compute_advantages_and_returns",
            "no advantages (supervised training)",
        ),
        switch("--normalize-advantages", "whiten advantages over ranks"),
        number("--kl-coef", 0.0, "weight of the KL divergence from the reference model in rewards (REINFORCE++)"),
        text("--custom-loss-function-path", None, "the function of custom_loss"),
        text("--custom-pg-loss-reducer-function-path", None, "reducer of the policy loss"),
        switch("--use-unbiased-kl", "weigh KL by the ratio"),
        integer("--ref-update-interval", None, "the reference becomes the actor after every so many rollouts"),
        number("--gamma", 1.0, "discount of what comes later in a response (PPO, REINFORCE++)"),
        number("--lambd", 1.0, "lambda of generalised advantage estimation (PPO)"),
        switch("--use-rollout-entropy", "entropy in the pass over old log-probs"),
        switch("--observe-training-entropy", "watch entropy without gradient in sft_loss, too"),
        switch("--reset-optimizer-states", "the optimizer forgets its history at each rollout"),
        switch("--use-rollout-logprobs", "the engine's log-probs are the ratio's denominator"),
        switch("--skip-actor-forward-only", "no pass over old log-probs: the ratio of a single step is 1"),
        switch("--keep-old-actor", "old log-probs are of the weights that generated, which the trainer keeps"),
        switch("--get-mismatch-metrics", "watch what --use-tis would do"),
        number("--tis-clip", 2.0, "upper bound of its weight"),
        number("--tis-clip-low", 0.0, "lower bound of its weight"),
        text("--custom-tis-function-path", None, "function that replaces it"),
        refused(switch("--use-indexer-replay", "replay the indexer's top-k"), INDEXER),
        refused(switch("--use-rollout-indexer-replay", "replay the engine's top-k"), INDEXER),
        switch("--use-opsm", "leave tokens of bad responses that have become too unlikely out of the loss (OPSM)"),
        number("--opsm-delta", 0.0001, "mean log-ratio of a response above which it does"),
        integer("--num-critic-only-steps", 0, "rollouts at the start in which only the critic learns"),
        path("--critic-load", "the critic's checkpoints to continue from (unset: --load with _critic behind it)"),
        path("--critic-save", "where its checkpoints go (unset: --save with _critic behind it)"),
        number("--critic-lr", None, "its learning rate (unset: --lr)"),
        integer("--critic-lr-warmup-iters", 0, "steps in which its learning rate rises to that"),
        number("--value-clip", 0.2, "how far values may move in the critic's loss"),
        switch("--use-opd", "on-policy distillation: advantages less the KL divergence from a teacher"),
        text(
            "--opd-type",
            None,
            "where the teacher is: an SGLang server, or a second model in the trainer (megatron, with any backend)",
            choices=("sglang", "megatron"),
        ),
        number("--opd-kl-coef", 1.0, "weight of that divergence"),
        refused(integer("--opd-log-prob-top-k", 0, "tokens of a position that are compared"), TOP_K, only=(0,)),
        refused(
            text(
                "--opd-top-k-strategy",
                "only-student",
                "which tokens are compared",
                choices=("only-student", "only-teacher", "intersection", "union", "xor"),
            ),
            TOP_K,
        ),
        refused(
            text("--opd-reward-weight-mode", "student_p", "weights", choices=("student_p", "teacher_p", "none")), TOP_K
        ),
        refused(switch("--opd-topk-per-position", "tokens by position"), TOP_K),
        text("--opd-teacher-urls", None, "servers of several teachers, NAME=URL each", nargs="+"),
        text("--opd-teacher-key", "opd_teacher", "key of a row's metadata that names its teacher"),
        path("--opd-teacher-load", "the teacher in the trainer: a checkpoint or Hugging Face directory"),
        integer("--opd-teacher-ckpt-step", None, "the rollout of its checkpoint (unset: the newest)"),
    ),
)
