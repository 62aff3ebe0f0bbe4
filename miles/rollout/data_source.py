"""Where prompts come from: a data set in epochs, and a buffer in front of it for what comes back."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from pathlib import Path
from typing import Any

from miles.rollout.base_types import Group
from miles.rollout.hooks import Hook
from miles.rollout.saved_state import cannot_save, group_from_plain, plain_group, read_values, write_values
from miles.utils.data import Dataset, NoDataset
from miles.utils.misc import load_function
from miles.utils.processing_utils import load_processor, shared_tokenizer
from miles.utils.types import Sample
from miles_agents.errors import ConfigError

logger = logging.getLogger(__name__)


class NoBuffer(ConfigError):
    """Groups are given back to a data source that keeps none."""

    code = "E-ROLL-013"


class DataSource(ABC):
    """What a rollout gets its prompts from. A user's own is named by ``--data-source-path``."""

    @abstractmethod
    def get_samples(self, num_samples: int) -> list[Group]:
        """So many prompt groups of ``n_samples_per_prompt`` samples each."""

    @abstractmethod
    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back."""

    @abstractmethod
    def save(self, rollout_id: int) -> None:
        """Write the position below ``args.save``.

        That is a new directory for each save; its files go to ``--save`` when the trainer's checkpoint is complete.
        """

    @abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Go to the position that ``save`` wrote; nothing happens if there is none."""

    def get_buffer_length(self) -> int | None:
        """Groups that came back and wait; None: it is not known."""
        return None


class RolloutDataSource(DataSource):
    """The prompts of ``--prompt-data`` in epochs, shuffled by seed and epoch with ``--rollout-shuffle``.

    Each group is ``n_samples_per_prompt`` deep copies of a prompt; ``group_index`` and ``index`` count up through the
    run.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.epoch_id = 0
        self.sample_offset = 0
        self.sample_group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        self.dataset: Dataset | None = load_dataset(args) if args.rollout_global_dataset else None
        if self.dataset is not None and args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def get_samples(self, num_samples: int) -> list[Group]:
        """See ``DataSource``."""
        return [self._numbered(self._next_prompt()) for _ in range(num_samples)]

    def _next_prompt(self) -> Group:
        """A group of the next prompt, whose samples share nothing."""
        count = self.args.n_samples_per_prompt
        if self.dataset is None:
            return [Sample() for _ in range(count)]
        if self.sample_offset >= len(self.dataset):
            self.epoch_id += 1
            self.sample_offset = 0
            if self.args.rollout_shuffle:
                self.dataset.shuffle(self.epoch_id)
        offset = self.sample_offset
        self.sample_offset += 1
        copies = getattr(self.dataset, "copies", None)  # a data set of the user's may have none
        if copies is None:
            return [copy.deepcopy(self.dataset.samples[offset]) for _ in range(count)]
        group: Group = copies(offset, count)
        return group

    def _numbered(self, group: Group) -> Group:
        for sample in group:
            sample.group_index = self.sample_group_index
            sample.index = self.sample_index
            self.sample_index += 1
        self.sample_group_index += 1
        return group

    def add_samples(self, samples: list[Group]) -> None:
        """Refused: see ``RolloutDataSourceWithBuffer``."""
        raise NoBuffer(
            f"{type(self).__name__} takes no groups back",
            evidence=f"{len(samples)} groups were given back",
            advice="Use RolloutDataSourceWithBuffer, or override add_samples.",
        )

    def save(self, rollout_id: int) -> None:
        """See ``DataSource``. The file is one that ``torch.load(weights_only=True)`` reads."""
        path = self._path(rollout_id)
        if path is None or self.dataset is None:
            return
        state = {
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": self.metadata,
        }
        save_with_torch(path, state)

    def load(self, rollout_id: int | None = None) -> None:
        """See ``DataSource``; looks below ``args.load``."""
        path = self._path(rollout_id, "load")
        if path is None or self.dataset is None:
            return
        if not path.exists():
            logger.info("no data position in %s: the data set is read from its beginning", path)
            return
        import torch

        state = torch.load(path, weights_only=True)
        self.sample_offset = state["sample_offset"]
        self.epoch_id = state["epoch_id"]
        self.sample_group_index = state["sample_group_index"]
        self.sample_index = state["sample_index"]
        self.metadata = state["metadata"]
        if self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)
        if self.sample_offset > len(self.dataset):
            logger.warning("the data set has become smaller since %s was written; going on with the next epoch", path)

    def _path(self, rollout_id: int | None, where: str = "save") -> Path | None:
        directory = getattr(self.args, where, None)
        if not directory or rollout_id is None or rollout_id < 0:
            return None
        return Path(directory) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """With a buffer: groups that came back are given out first, in their order or as ``--buffer-filter-path`` says.

    ``discarded``: groups that the filter took out of the buffer without giving them out, for the ledger.
    """

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.buffer: list[Group] = []
        self.discarded: list[Group] = []
        self.buffer_filter = load_function(args.buffer_filter_path, flag="--buffer-filter-path") or pop_first

    def get_samples(self, num_samples: int) -> list[Group]:
        """From the buffer, then fresh ones."""
        groups = self._from_buffer(num_samples)
        return groups + super().get_samples(num_samples - len(groups))

    def _from_buffer(self, num_samples: int) -> list[Group]:
        if not self.buffer or num_samples == 0:
            return []
        before = list(self.buffer)
        hook = Hook("--buffer-filter-path", str(self.args.buffer_filter_path), self.buffer_filter)
        taken = hook.call(self.args, None, self.buffer, num_samples)
        if not isinstance(taken, list | tuple) or not all(isinstance(group, list) and group for group in taken):
            raise hook.bad_result(taken, "a list of groups out of the buffer")
        groups = list(taken)
        known = {id(group) for group in (*groups, *self.buffer)}
        self.discarded += [group for group in before if id(group) not in known]
        return groups

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups at the end of the buffer."""
        self.buffer.extend(samples)

    def get_buffer_length(self) -> int:
        """Groups in the buffer."""
        return len(self.buffer)

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        """Add to what is saved with the position."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        """What is saved with the position."""
        return self.metadata

    def save(self, rollout_id: int) -> None:
        """Position and buffer."""
        super().save(rollout_id)
        path = self._path(rollout_id)
        if path is not None:
            write_values(_buffer_path(path, rollout_id), map(plain_group, self.buffer))

    def load(self, rollout_id: int | None = None) -> None:
        """Position and buffer."""
        super().load(rollout_id)
        path = self._path(rollout_id, "load")
        if path is None or rollout_id is None:
            return
        buffer = _buffer_path(path, rollout_id)
        if buffer.exists():
            self.buffer = [group_from_plain(plain) for plain in read_values(buffer)]


def pop_first(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """The default of ``--buffer-filter-path``: the groups that have waited longest, taken out of ``buffer``."""
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken


def load_dataset(args: Namespace) -> Dataset:
    """The data set that the flags describe."""
    if not args.prompt_data:
        raise NoDataset(
            "--prompt-data is not given",
            evidence="the rollout needs prompts",
            advice="Give --prompt-data a JSONL file, or --disable-rollout-global-dataset with your own data source.",
        )
    tokenizer = shared_tokenizer(args.hf_checkpoint, args.chat_template_path)
    processor = load_processor(args.hf_checkpoint) if args.multimodal_keys else None
    return Dataset(
        args.prompt_data, tokenizer, processor, args.rollout_max_prompt_len,
        prompt_key=args.input_key, multimodal_keys=args.multimodal_keys, label_key=args.label_key,
        tool_key=args.tool_key, metadata_key=args.metadata_key, seed=args.rollout_seed,
        apply_chat_template=args.apply_chat_template, apply_chat_template_kwargs=args.apply_chat_template_kwargs,
    )  # fmt: skip


def save_with_torch(path: Path, value: Any) -> None:
    """``torch.save``, aside and renamed.

    Raises:
        CannotSave: It cannot be written.
    """
    import torch

    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise cannot_save(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _buffer_path(position: Path, rollout_id: int) -> Path:
    return position.with_name(f"rollout_buffer_{rollout_id}.msgpack")
