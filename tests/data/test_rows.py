import numpy as np
import pytest

from jaxdistill.data import pack_documents

CLS, SEP, PAD = 101, 102, 0
S = 16


def pack(lengths, sequence_length=S):
    """Documents of these lengths with all-different ids, and their rows."""
    ids = 1000 + np.arange(sum(lengths), dtype=np.uint32)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    return documents, *pack_documents(documents, sequence_length=sequence_length, cls_id=CLS, sep_id=SEP, pad_id=PAD)


def pieces(tokens, segments):
    """The pieces in reading order, each [row, first column, ids]; checks that each row is well formed."""
    found = []
    for row, (row_tokens, row_segments) in enumerate(zip(tokens, segments, strict=True)):
        used = int((row_segments > 0).sum())
        assert (row_segments[used:] == 0).all() and (row_tokens[used:] == PAD).all()
        assert set(np.diff(row_segments[:used])) <= {0, 1} and row_segments[0] == 1
        for segment in range(1, row_segments.max() + 1):
            (columns,) = np.nonzero(row_segments == segment)
            piece = row_tokens[columns]
            assert piece[0] == CLS and piece[-1] == SEP and len(piece) > 2
            assert not {CLS, SEP, PAD} & set(piece[1:-1].tolist())
            found.append((row, int(columns[0]), piece[1:-1].tolist()))
    return found


def assert_nothing_dropped(documents, tokens, segments):
    found = [ids for _, _, ids in pieces(tokens, segments)]
    for document in documents:
        rest = document.tolist()
        while rest:  # a piece never crosses into the next document
            piece = found.pop(0)
            assert piece == rest[: len(piece)]
            rest = rest[len(piece) :]
    assert not found


def test_by_hand():
    _, tokens, segments = pack([3, 20, 0, 1])
    assert tokens.tolist() == [
        [CLS, 1000, 1001, 1002, SEP, CLS, *range(1003, 1012), SEP],
        [CLS, *range(1012, 1023), SEP, CLS, 1023, SEP],
    ]
    assert segments.tolist() == [[1] * 5 + [2] * 11, [1] * 13 + [2] * 3]
    assert segments.dtype == np.uint16 and tokens.dtype == np.uint32


@pytest.mark.parametrize(
    ("lengths", "num_rows"), [([S - 2], 1), ([S - 1], 2), ([3 * S], 4), ([3 * (S - 2)], 3), ([1], 1), ([0, 0, 5, 0], 1), ([0], 0)]
)
def test_lengths_around_the_row(lengths, num_rows):
    documents, tokens, segments = pack(lengths)
    assert tokens.shape == segments.shape == (num_rows, S)
    assert_nothing_dropped(documents, tokens, segments)


@pytest.mark.parametrize("sequence_length", [8, 9, 16, 128, 512])
def test_random_lengths(sequence_length):
    rng = np.random.default_rng(sequence_length)
    edges = [0, 1, 2, 5, 6, 7, sequence_length - 3, sequence_length - 2, sequence_length - 1, 3 * sequence_length]
    lengths = [int(rng.choice([rng.choice(edges), rng.integers(0, 2 * sequence_length)])) for _ in range(400)]
    documents, tokens, segments = pack(lengths, sequence_length)
    assert_nothing_dropped(documents, tokens, segments)
    padding = (segments == 0).sum(axis=1)
    assert (padding[:-1] < 8).all()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (6, 8, [(0, 0, 6), (0, 8, 6), (1, 0, 2)]),  # 8 slots left: cut
        (7, 8, [(0, 0, 7), (1, 0, 8)]),  # 7 slots left and it does not fit: next row
        (7, 5, [(0, 0, 7), (0, 9, 5)]),  # 7 slots left and it fits
        (11, 1, [(0, 0, 11), (0, 13, 1)]),
        (12, 1, [(0, 0, 12), (1, 0, 1)]),
    ],
)
def test_the_end_of_a_row(first, second, expected):
    _, tokens, segments = pack([first, second])
    assert [(row, column, len(ids)) for row, column, ids in pieces(tokens, segments)] == expected


def test_no_documents_have_no_dtype():
    with pytest.raises(ValueError, match="no documents"):
        pack_documents([], sequence_length=S, cls_id=CLS, sep_id=SEP, pad_id=PAD)
