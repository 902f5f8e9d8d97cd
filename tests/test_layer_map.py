"""Every map over every pair of depths, the papers' examples by hand, and what is refused."""

import itertools
from collections import Counter

import pytest

from jaxdistill.errors import InputError
from jaxdistill.layer_map import STRATEGIES, layer_pairs

DEPTHS = list(itertools.product(range(1, 13), range(1, 25)))
WITHOUT_OPTIONS = sorted(set(STRATEGIES) - {"explicit", "teacher_layer"})
# These two count from the teacher's end, one layer for each of the student's.
NO_DEEPER = ("last", "uniform_plus_last")


def by_student(pairs) -> dict[int, list[int]]:
    return {student: [t for s, t in pairs if s == student] for student, _ in pairs}


@pytest.mark.parametrize("strategy", WITHOUT_OPTIONS)
def test_in_range_and_increasing_for_all_depths(strategy):
    for num_student, num_teacher in DEPTHS:
        if strategy in NO_DEEPER and num_student > num_teacher:
            with pytest.raises(InputError, match=f"no deeper than the teacher, got {num_student} and {num_teacher} layers"):
                layer_pairs(strategy, num_student, num_teacher)
            continue
        pairs = layer_pairs(strategy, num_student, num_teacher)
        assert pairs == tuple(sorted(set(pairs)))
        assert all(1 <= s <= num_student and 1 <= t <= num_teacher for s, t in pairs)
        layers = by_student(pairs)
        if strategy != "random":
            assert layers[num_student][-1] == num_teacher  # the last block learns from the last
        lowest, highest = ([pick(own) for own in layers.values()] for pick in (min, max))
        assert lowest == sorted(lowest) and highest == sorted(highest)
        if strategy != "last_layer":
            assert list(layers) == list(range(1, num_student + 1))


def test_uniform_consecutive_covers_the_teacher():
    for num_student, num_teacher in DEPTHS:
        covered = {t for _, t in layer_pairs("uniform_consecutive", num_student, num_teacher)}
        assert covered == set(range(1, num_teacher + 1))
        inclusive = {t for _, t in layer_pairs("uniform_consecutive", num_student, num_teacher, inclusive=True)}
        assert inclusive == set(range(num_teacher + 1))


def test_learned_names_every_pair_of_blocks():
    for num_student, num_teacher in DEPTHS:
        every = itertools.product(range(1, num_student + 1), range(1, num_teacher + 1))
        assert layer_pairs("learned", num_student, num_teacher) == tuple(every)


def test_one_to_one_maps_are_strict_where_the_teacher_is_deeper():
    for strategy in ("last", "first_and_last_uniform", "random"):
        for num_student, num_teacher in DEPTHS:
            if num_student <= num_teacher:
                teachers = [t for _, t in layer_pairs(strategy, num_student, num_teacher)]
                assert len(set(teachers)) == num_student and teachers == sorted(teachers)


def test_embeddings_add_one_pair_to_any_map():
    options = {"teacher_layer": {"teacher_layer": -1}, "explicit": {"pairs": [[3, 12], [0, 1]]}}
    for strategy in STRATEGIES:
        own = options.get(strategy, {})
        without = layer_pairs(strategy, 3, 12, **own)
        assert (0, 0) not in without and layer_pairs(strategy, 3, 12, embeddings=False, **own) == without
        assert layer_pairs(strategy, 3, 12, embeddings=True, **own) == ((0, 0), *without)
    assert layer_pairs("explicit", 3, 12, pairs=[[0, 0], [1, 1]], embeddings=True) == ((0, 0), (1, 1))


def test_random_map_with_a_deeper_student_repeats_layers():
    draws = [[t for _, t in layer_pairs("random", 12, 3, draw=draw)] for draw in range(200)]
    assert all(len(draw) == 12 and draw == sorted(draw) for draw in draws)
    counts = Counter(layer for draw in draws for layer in draw)
    assert all(abs(counts[layer] - 800) < 4 * (2400 * 1 / 3 * 2 / 3) ** 0.5 for layer in (1, 2, 3))


def test_random_map_is_a_function_of_seed_and_draw():
    """The numbers are fixed: processes that drew others would break a run, a version that drew others the runs it resumes."""
    assert layer_pairs("random", 4, 12, seed=3, draw=7) == ((1, 1), (2, 5), (3, 9), (4, 12))
    assert layer_pairs("random", 4, 12) == layer_pairs("random", 4, 12, seed=0, draw=0)
    by_draw, by_seed = ({layer_pairs("random", 6, 24, **{name: i}) for i in range(100)} for name in ("draw", "seed"))
    assert len(by_draw) == len(by_seed) == 100 and len(by_draw | by_seed) == 199
    assert layer_pairs("random", 6, 24, seed=1, draw=11) != layer_pairs("random", 6, 24, seed=11, draw=1)


@pytest.mark.parametrize(("num_student", "num_teacher"), [(1, 12), (4, 12), (6, 24), (11, 12)])
def test_random_maps_draw_every_layer_as_often(num_student, num_teacher):
    """The sum of squared deviations is chi-square with L_T - 1 degrees of freedom; 5 standard deviations above its mean."""
    draws = 4000
    counts = Counter(t for draw in range(draws) for _, t in layer_pairs("random", num_student, num_teacher, draw=draw))
    share = num_student / num_teacher
    spread = draws * share * (1 - share) * num_teacher / (num_teacher - 1)  # without replacement: the counts sum to a constant
    statistic = sum((counts[layer] - draws * share) ** 2 for layer in range(1, num_teacher + 1)) / spread
    assert statistic < num_teacher - 1 + 5 * (2 * (num_teacher - 1)) ** 0.5


def test_random_maps_draw_every_subset_as_often():
    counts = Counter(layer_pairs("random", 2, 5, draw=draw) for draw in range(4000))
    assert len(counts) == 10
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 9 + 5 * 18**0.5


@pytest.mark.parametrize(
    ("strategy", "depths", "options", "expected"),
    [
        ("last_layer", (6, 12), {}, {6: [12]}),
        ("last", (3, 12), {}, {1: [10], 2: [11], 3: [12]}),
        ("uniform", (6, 12), {}, {1: [2], 2: [4], 3: [6], 4: [8], 5: [10], 6: [12]}),
        ("uniform", (3, 12), {}, {1: [4], 2: [8], 3: [12]}),
        ("uniform", (5, 12), {}, {1: [3], 2: [6], 3: [9], 4: [12], 5: [12]}),  # k = 3; 15 is clamped to 12
        ("uniform", (4, 2), {}, {1: [1], 2: [2], 3: [2], 4: [2]}),
        ("uniform_consecutive", (4, 12), {}, {1: [1, 2, 3], 2: [4, 5, 6], 3: [7, 8, 9], 4: [10, 11, 12]}),
        ("uniform_consecutive", (3, 6), {"inclusive": True}, {1: [0, 1, 2], 2: [2, 3, 4], 3: [4, 5, 6]}),
        ("uniform_consecutive", (5, 6), {}, {1: [1, 2], 2: [3, 4], 3: [5, 6], 4: [6], 5: [6]}),
        ("uniform_plus_last", (3, 12), {}, {1: [4, 10], 2: [8, 11], 3: [12]}),
        ("uniform_plus_last", (6, 12), {}, {1: [2, 7], 2: [4, 8], 3: [6, 9], 4: [8, 10], 5: [10, 11], 6: [12]}),
        ("teacher_layer", (6, 12), {"teacher_layer": 11}, {6: [11]}),
        ("teacher_layer", (6, 24), {"teacher_layer": 21}, {6: [21]}),
        ("teacher_layer", (6, 12), {"teacher_layer": -1}, {6: [12]}),
        ("teacher_layer", (6, 12), {"teacher_layer": -2}, {6: [11]}),
        ("teacher_layer", (6, 12), {"teacher_layer": -12}, {6: [1]}),
        ("first_and_last_uniform", (3, 12), {}, {1: [1], 2: [7], 3: [12]}),  # the middle of 1 and 12 is 6.5, rounded up
        ("first_and_last_uniform", (6, 12), {}, {1: [1], 2: [3], 3: [5], 4: [8], 5: [10], 6: [12]}),  # steps of 2.2
        ("first_and_last_uniform", (9, 12), {}, {1: [1], 2: [2], 3: [4], 4: [5], 5: [7], 6: [8], 7: [9], 8: [11], 9: [12]}),
        ("first_and_last_uniform", (1, 12), {}, {1: [12]}),
        ("uniform", (4, 12), {"embeddings": True}, {0: [0], 1: [3], 2: [6], 3: [9], 4: [12]}),  # TinyBERT
        ("last_layer", (6, 12), {"embeddings": True}, {0: [0], 6: [12]}),
        ("learned", (2, 3), {}, {1: [1, 2, 3], 2: [1, 2, 3]}),
        ("random", (3, 3), {"draw": 5}, {1: [1], 2: [2], 3: [3]}),
        ("random", (4, 1), {"seed": 2}, {1: [1], 2: [1], 3: [1], 4: [1]}),
        ("explicit", (3, 12), {"pairs": [[1, 4], [2, 8], [3, 12]]}, {1: [4], 2: [8], 3: [12]}),
        ("explicit", (3, 12), {"pairs": [[3, 12], [3, 11], [0, 0], [3, 12]]}, {0: [0], 3: [11, 12]}),
    ],
)
def test_by_hand(strategy, depths, options, expected):
    assert by_student(layer_pairs(strategy, *depths, **options)) == expected


@pytest.mark.parametrize(
    ("strategy", "depths", "options", "message"),
    [
        ("unifrom", (6, 12), {}, "unknown layer map 'unifrom'; did you mean 'uniform'"),
        ("skip_every_other", (6, 12), {}, "unknown layer map 'skip_every_other'; known: explicit, .*uniform_plus_last"),
        ("last", (6, 12), {"inclusive": True}, "'last' has no option 'inclusive'; its options: embeddings$"),
        ("uniform_consecutive", (6, 12), {"pairs": []}, "has no option 'pairs'; its options: embeddings, inclusive$"),
        ("teacher_layer", (6, 12), {}, "'teacher_layer' needs the option 'teacher_layer'"),
        ("explicit", (6, 12), {}, "'explicit' needs the option 'pairs'"),
        ("random", (6, 12), {"every": 100}, "'random' has no option 'every'; its options: draw, embeddings, seed$"),
        ("learned", (6, 12), {"temperature": 0.1}, "'learned' has no option 'temperature'"),
        ("explicit", (6, 12), {"pairs": [], "embeddings": True}, "empty: name at least one"),
        ("explicit", (6, 12), {"pairs": []}, "empty: name at least one"),
        ("explicit", (6, 12), {"pairs": [[6, 13]]}, r"teacher layer 13 is out of range, the teacher has layers 0\.\.12"),
        ("explicit", (6, 12), {"pairs": [[7, 12]]}, r"student layer 7 is out of range, the student has layers 0\.\.6"),
        ("explicit", (6, 12), {"pairs": [[6, -1]]}, "teacher layer -1 is out of range"),
        ("teacher_layer", (6, 12), {"teacher_layer": 13}, r"13 is out of range, the teacher has layers 1\.\.12, or -1\.\.-12 from the end"),
        ("teacher_layer", (6, 12), {"teacher_layer": 0}, "'teacher_layer': 0 is out of range"),
        ("teacher_layer", (6, 12), {"teacher_layer": -13}, "'teacher_layer': -13 is out of range"),
        ("uniform", (0, 12), {}, "both depths must be at least 1, got 0 and 12"),
        ("uniform", (6, 0), {}, "both depths must be at least 1, got 6 and 0"),
    ],
)
def test_refusals(strategy, depths, options, message):
    with pytest.raises(InputError, match=message) as caught:
        layer_pairs(strategy, *depths, **options)
    assert "\n" not in str(caught.value)
