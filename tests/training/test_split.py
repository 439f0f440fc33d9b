"""Who is kept from training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autospec.datasets.split import held_out_rows
from autospec.errors import UserError

SUBJECTS = [f"s{number:02d}" for number in range(40)]
TARGET = ["SZ"] * 12 + ["HC"] * 28


@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=60),
    st.floats(0.01, 0.5),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_the_split_is_by_subject_and_by_target_and_knows_no_order(target, share, seed, shuffle):
    subjects = [f"s{number}" for number in range(len(target))]
    sizes = {label: target.count(label) for label in target}
    if max(sizes.values()) == 1:
        with pytest.raises(UserError, match="no target has a second subject"):
            held_out_rows(subjects, target, share, seed)
        return
    # Two scans of each subject, in another order.
    order = [*range(len(target)), *range(len(target))]
    shuffle.shuffle(order)
    once = held_out_rows(subjects, target, share, seed)
    twice = held_out_rows([subjects[row] for row in order], [target[row] for row in order], share, seed)
    assert twice.tolist() == [once[row] for row in order]
    for label, size in sizes.items():
        chosen = sum(held for held, other in zip(once, target, strict=True) if other == label)
        assert chosen < size
    room = len(target) - len(sizes)
    assert once.sum() == min(room, max(1, round(share * len(target))))


def test_targets_are_held_out_in_proportion():
    held = held_out_rows(SUBJECTS, TARGET, 0.25, 0)
    assert (held[:12].sum(), held[12:].sum()) == (3, 7)


def test_another_seed_holds_out_others_and_the_same_the_same():
    splits = [tuple(held_out_rows(SUBJECTS, TARGET, 0.2, seed)) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len(set(splits)) == 3


def test_nobody_is_held_out_where_no_share_is_asked_for():
    assert not held_out_rows(["a"], ["SZ"], 0.0, 0).any()


def test_every_subject_is_held_out_about_as_often():
    times = np.sum([held_out_rows(SUBJECTS, TARGET, 0.25, seed) for seed in range(400)], axis=0)
    assert times.min() > 60  # 100 are expected, with a standard deviation of about 9
    assert times.max() < 140
