"""Command lines and facts for tests of flags: what a resolved recipe needs, and one change at a time."""

from dataclasses import replace

from miles.flags.facts import CheckpointFacts, DirectoryFacts, Facts
from miles.flags.parse import parse
from miles.flags.prompt_facts import DataFacts
from miles.flags.resolve import resolve
from miles.flags.table import table

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}

MODEL = DirectoryFacts(exists=True, config=QWEN3, has_tokenizer=True, has_weights=True)
CHECKPOINT = DirectoryFacts(exists=True, newest=CheckpointFacts("megatron", 7), steps={3: "megatron", 7: "megatron"})
RELEASED = DirectoryFacts(exists=True, newest=CheckpointFacts("megatron", None))
"""What ``miles convert hf-to-torch-dist`` writes."""
DATA = DataFacts(rows=64, columns=("prompt", "label"), absent={"metadata": 1})
FACTS = Facts(directories={"M": MODEL}, data={"D": DATA}, cores=4, default_run_dir="/runs/new", cwd="/home/me")
GPUS = replace(FACTS, gpus=8, torch_has_cuda=True)

RECIPE = (
    "--hf-checkpoint M --prompt-data D --rollout-batch-size 8 --n-samples-per-prompt 4 --rollout-max-response-len 64 "
    "--rm-type math --actor-num-gpus-per-node 2 --colocate"
)


def outcome(flags="", *, recipe=RECIPE, facts=FACTS, without=()):
    """Resolve the recipe, without some of its flags, with further ones behind it."""
    words = recipe.split()
    for name in without:
        place = words.index(name)
        end = place + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        del words[place:end]
    return resolve(parse([*words, *(flags.split() if isinstance(flags, str) else flags)], table()), table(), facts)


def config(flags="", **more):
    """The config of a command line that works."""
    resolved = outcome(flags, **more)
    assert not resolved.problems, [problem.lines() for problem in resolved.problems]
    return resolved.config


def problems(flags="", **more):
    """Flag and text of each problem."""
    return {problem.flag: " ".join(problem.lines()) for problem in outcome(flags, **more).problems}


def with_directory(path, found, facts=FACTS):
    return replace(facts, directories={**facts.directories, path: found})


def with_model(**changes):
    """Facts in which the model's config.json has these fields, or lacks them (None)."""
    fields = {key: value for key, value in {**QWEN3, **changes}.items() if value is not None}
    return with_directory("M", replace(MODEL, config=fields))


def with_data(path, found, facts=FACTS):
    return replace(facts, data={**facts.data, path: found})
