"""Tokenizers and processors from a model directory. Imports transformers on first use only."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from miles_agents.errors import ConfigError


class NoTokenizer(ConfigError):
    """A model directory has no tokenizer that can be loaded."""

    code = "E-DATA-007"


class NoChatTemplate(ConfigError):
    """A chat template is asked for, and there is none, or it refuses a conversation."""

    code = "E-DATA-008"


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer of a HF model directory, with the chat template of a file in place of its own if one is given.

    Raises:
        NoTokenizer: There is none, or it cannot be loaded.
        NoChatTemplate: The file cannot be read.
    """
    if Path(name_or_path).is_dir() and not _has_tokenizer_files(Path(name_or_path)):
        # The library would make one without a vocabulary from the model's type alone.
        raise _no_tokenizer(name_or_path, "none of its files is a tokenizer's")
    from transformers import AutoTokenizer

    kwargs.setdefault("trust_remote_code", True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # boundary: the library raises whatever its parsers raise
        raise _no_tokenizer(name_or_path, f"{type(error).__name__}: {str(error)[:500]}") from error
    if chat_template_path:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except OSError as error:
            raise NoChatTemplate(
                f"--chat-template-path {chat_template_path} cannot be read",
                evidence=str(error),
                advice="Name a file with a Jinja template.",
            ) from error
    return tokenizer


def _no_tokenizer(path: str, evidence: str) -> NoTokenizer:
    return NoTokenizer(
        f"there is no tokenizer in {path}",
        evidence=f"{_listing(path)}\n{evidence}",
        advice="Let --hf-checkpoint name a model directory with tokenizer.json and tokenizer_config.json.",
    )


def _has_tokenizer_files(directory: Path) -> bool:
    names = [entry.name for entry in directory.iterdir()]
    return any(name in _TOKENIZER_FILES or name.endswith((".tiktoken", ".model")) for name in names)


_TOKENIZER_FILES = {"tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "sentencepiece.bpe.model"}


@functools.lru_cache(maxsize=8)
def shared_tokenizer(name_or_path: str, chat_template_path: str | None = None) -> Any:
    """``load_tokenizer``, once per process. Do not change what it returns."""
    return load_tokenizer(name_or_path, chat_template_path)


def load_processor(name_or_path: str, **kwargs: Any) -> Any | None:
    """The processor of a model with media; None for a text model."""
    directory = Path(name_or_path)
    if directory.is_dir() and not any((directory / n).exists() for n in _PROCESSOR_FILES):
        return None
    from transformers import AutoProcessor

    kwargs.setdefault("trust_remote_code", True)
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError):
        return None
    # A text model's "processor" is its tokenizer.
    return processor if hasattr(processor, "image_processor") or hasattr(processor, "feature_extractor") else None


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def extract_multimodal_train_inputs(inputs: Any) -> dict[str, Any] | None:
    """What a processor made beside token ids and mask: tensors that the trainer's model needs."""
    found = {key: value for key, value in dict(inputs).items() if key not in ("input_ids", "attention_mask")}
    return found or None


def apply_chat_template(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    tokenize: bool = False,
    **kwargs: Any,
) -> Any:
    """A conversation as text, or as token ids.

    Raises:
        NoChatTemplate: The tokenizer has none, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise NoChatTemplate(
            "the tokenizer has no chat template",
            evidence=f"of {getattr(tokenizer, 'name_or_path', tokenizer)}",
            advice="Give one by --chat-template-path, or leave out --apply-chat-template.",
        )
    if tokenize:
        kwargs["return_dict"] = False
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=tokenize, **kwargs
        )
    except Exception as error:  # boundary: a template is a program of the model's makers
        raise NoChatTemplate(
            "the chat template refuses a conversation",
            evidence=f"{type(error).__name__}: {str(error)[:500]}\nthe conversation: {str(messages)[:500]}",
            advice="Check the roles and contents of the messages, and --apply-chat-template-kwargs.",
        ) from error


def _listing(path: str) -> str:
    directory = Path(path)
    if not directory.exists():
        return f"{path} does not exist here, and no model hub has it"
    if not directory.is_dir():
        return f"{path} is not a directory"
    return f"it has: {', '.join(sorted(entry.name for entry in directory.iterdir())[:30]) or 'nothing'}"
