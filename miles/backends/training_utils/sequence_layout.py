"""Which tokens of packed samples a context-parallel rank works on, and where they lie in its row.

Each sample is padded to a multiple of ``2 * cp`` and cut into that many chunks; rank r has chunks r and 2 cp - 1 - r,
so that causal attention costs all ranks the same. With one rank nothing is padded and nothing moves. At the end of the
row there may be a tail, a sequence of padding, that makes its length a multiple of what sequence parallelism needs.

Pure: tensors on the CPU in, tensors on the CPU out. Terms: a *position* counts within a sample, a *row* within what
this rank has, a *place* in the flat ``[sum R_i]`` response tokens of all samples.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class SequenceLayout:
    """See the module's docstring.

    Attributes:
        lengths: Tokens of each sample.
        cp_size: Ranks that share the samples.
        cp_rank: This one.
        multiple: Of what the length of a rank's row is.
        width: Of a padded batch ("bshd"): each sample is filled up to so many tokens, and there is no tail. Rows are
            those of the samples one after the other. Without context parallelism only. None: packed.
    """

    lengths: tuple[int, ...]
    cp_size: int = 1
    cp_rank: int = 0
    multiple: int = 1
    width: int | None = None

    @classmethod
    def padded(cls, lengths: tuple[int, ...], multiple: int = 1) -> SequenceLayout:
        """All samples as long as the longest, and that a multiple."""
        return cls(lengths, multiple=multiple, width=-(-max(lengths) // multiple) * multiple)

    @cached_property
    def padded_lengths(self) -> list[int]:
        """Of the samples, and of the tail if there is one; over all ranks."""
        if self.width is not None:
            return [self.width] * len(self.lengths)
        unit = 2 * self.cp_size if self.cp_size > 1 else 1
        padded = [-(-length // unit) * unit for length in self.lengths]
        tail = -(sum(padded) // self.cp_size) % self.multiple
        if self.cp_size > 1 and tail % 2:
            # Each rank has two chunks of the tail, too. Rows are even so far: an odd tail has an odd multiple.
            tail += self.multiple
        return [*padded, *([tail * self.cp_size] if tail else [])]

    @property
    def num_rows(self) -> int:
        """Tokens that this rank has, padding included."""
        return sum(self.padded_lengths) // self.cp_size

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 ``[n + 1]``: bounds of the padded sequences, over all ranks; the tail is the last one."""
        return torch.tensor([0, *itertools.accumulate(self.padded_lengths)], dtype=torch.int32)

    @cached_property
    def rows_of_chunks(self) -> list[list[tuple[int, range]]]:
        """Per sequence its chunks on this rank, in order of rows: number of the chunk, positions that it covers."""
        found = []
        for length in self.padded_lengths:
            size = length // (2 * self.cp_size) if self.cp_size > 1 else length
            chunks = [0] if self.cp_size == 1 else [self.cp_rank, 2 * self.cp_size - 1 - self.cp_rank]
            found.append([(chunk, range(chunk * size, (chunk + 1) * size)) for chunk in chunks])
        return found

    @cached_property
    def token_index(self) -> torch.Tensor:
        """int64 ``[rows]``: which of the packed tokens each row has; -1 for padding."""
        starts = [0, *itertools.accumulate(self.lengths)]
        parts = []
        for number, chunks in enumerate(self.rows_of_chunks):
            real = self.lengths[number] if number < len(self.lengths) else 0
            start = starts[number] if number < len(self.lengths) else 0
            for _, positions in chunks:
                index = torch.arange(positions.start, positions.stop)
                parts.append(torch.where(index < real, index + start, -1))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def gathered_index(self) -> torch.Tensor:
        """int64 ``[sum of padded lengths]``: for each position of each sequence in turn, where it lies in the rows of
        all ranks put one after the other."""
        rows, cp = self.num_rows, self.cp_size
        parts, offset = [], 0
        for length in self.padded_lengths:
            size = length // (2 * cp) if cp > 1 else length
            for chunk in range(2 * cp if cp > 1 else 1):
                second = chunk >= cp
                rank = 2 * cp - 1 - chunk if second else chunk
                parts.append(torch.arange(size) + rank * rows + offset + (size if second and cp > 1 else 0))
            offset += length // cp
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def local_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's row of the packed ``tokens`` ``[T]``; padding is token 0."""
        if self.is_whole:
            return tokens
        index = self.token_index.to(tokens.device)
        return torch.where(index >= 0, tokens[index.clamp(min=0)], 0)

    @property
    def is_whole(self) -> bool:
        """Rows are the packed tokens as they are."""
        return self.width is None and self.cp_size == 1 and len(self.padded_lengths) == len(self.lengths)

    def predicting_rows(self, response_lengths: list[int], *, ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of this rank whose logits predict response tokens, and the places of these tokens. int64, as many each.

        A response at positions ``[start, end)`` is predicted by positions ``[start - 1, end - 1)``; of logits that
        predict ``ahead`` tokens further on, by so many before these. Tokens that none predicts have no row.
        """
        rows, places, row, place = [], [], 0, 0
        for number, chunks in enumerate(self.rows_of_chunks):
            if number == len(self.lengths):
                break
            total, response = self.lengths[number], response_lengths[number]
            first = total - response - 1 - ahead
            for _, positions in chunks:
                begin, end = max(positions.start, first, 0), min(positions.stop, total - 1 - ahead)
                if begin < end and response:
                    rows.append(torch.arange(begin, end) - positions.start + row)
                    places.append(torch.arange(begin, end) - first + place)
                row += len(positions)
            place += response
        empty = torch.zeros(0, dtype=torch.int64)
        return (torch.cat(rows), torch.cat(places)) if rows else (empty, empty)
