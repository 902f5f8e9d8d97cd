"""Documents of any length into rows of one length, with nothing dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# [CLS], [SEP] and six tokens: a shorter start of a cut document has too little context to learn from, so that the
# end of the row stays empty instead (at most 7 slots of a row).
SHORTEST_PIECE_SLOTS = 8


def _place(lengths: Sequence[int], sequence_length: int) -> np.ndarray:
    """Where the documents' pieces lie: (first slot, number of tokens, segment) of each, [P, 3]; slot = row * S + column."""
    pieces: list[tuple[int, int, int]] = []
    row = column = segment = 0
    for length in lengths:
        while length:
            left = sequence_length - column
            if length > left - 2 and left < SHORTEST_PIECE_SLOTS:
                row, column, segment = row + 1, 0, 0
                continue
            tokens = min(length, left - 2)
            segment += 1
            pieces.append((row * sequence_length + column, tokens, segment))
            column += tokens + 2
            length -= tokens
    return np.array(pieces, np.int64).reshape(-1, 3)


def pack_documents(
    token_lists: Sequence[np.ndarray], *, sequence_length: int, cls_id: int, sep_id: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that hold the documents in order, each piece as `[CLS] piece [SEP]`.

    A document that does not fit into what is left of a row is cut and goes on in the next row as a new piece. A document of no
    tokens takes no place.

    Args:
      token_lists: the ids of each document, arrays of one dtype.
      sequence_length: S, at least 8.

    Returns:
      tokens [N, S] in the dtype of the ids, and segments [N, S] uint16: 1, 2, 3.. for the pieces of a row, 0 = padding.
    """
    if not token_lists:
        raise ValueError("no documents: the dtype of the rows is that of their ids")
    stream = np.concatenate(token_lists)
    starts, lengths, segments = _place([len(tokens) for tokens in token_lists], sequence_length).T
    wrapped_lengths = lengths + 2
    ends = np.cumsum(wrapped_lengths)  # in the stream with special tokens

    num_rows = int(starts[-1]) // sequence_length + 1 if len(starts) else 0
    wrapped = np.empty(len(stream) + 2 * len(starts), stream.dtype)
    is_token = np.ones(len(wrapped), bool)
    for positions, special_id in ((ends - wrapped_lengths, cls_id), (ends - 1, sep_id)):
        wrapped[positions] = special_id
        is_token[positions] = False
    wrapped[is_token] = stream

    slots = np.repeat(starts - (ends - wrapped_lengths), wrapped_lengths) + np.arange(len(wrapped))
    row_tokens = np.full(num_rows * sequence_length, pad_id, stream.dtype)
    row_segments = np.zeros(num_rows * sequence_length, np.dtype("<u2"))
    row_tokens[slots] = wrapped
    row_segments[slots] = np.repeat(segments, wrapped_lengths)
    return row_tokens.reshape(-1, sequence_length), row_segments.reshape(-1, sequence_length)
