"""`micro_batch auto`: from an out-of-memory error downwards, to the largest that fits."""

import pytest
import torch

from pipeline.data.order import fitting_micro_batches, layout_of
from pipeline.micro_batch import largest_that_fits
from pipeline.parallel import Ranks

ALONE = Ranks(0, 1, launched=False)


def device_with_room_for(pictures: int, tried: list[int]):
    def attempt(size: int) -> None:
        tried.append(size)
        if size > pictures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return attempt


def test_the_largest_that_fits_is_taken():
    tried: list[int] = []
    assert largest_that_fits([8, 16, 32, 64, 128], device_with_room_for(40, tried), ALONE) == 32
    assert tried == [128, 64, 32]


def test_a_cpu_that_has_no_more_memory_counts_too():
    def attempt(size: int) -> None:
        if size > 8:
            torch.empty(2**62, dtype=torch.uint8)

    assert largest_that_fits([8, 16], attempt, ALONE) == 8


def test_where_nothing_fits_the_way_out_is_named():
    with pytest.raises(ValueError, match=r"not even 8 pictures.*activation_checkpointing"):
        largest_that_fits([8, 16], device_with_room_for(4, []), ALONE)


def test_another_error_is_not_taken_for_a_full_memory():
    def attempt(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits([8], attempt, ALONE)


def test_only_sizes_that_keep_the_global_batch_are_tried():
    assert fitting_micro_batches(96, 4096, 2, 4) == [4, 8, 12, 16, 24, 48]
    assert all(layout_of(96, size, 0, 2, 4).global_batch == 96 for size in (4, 48))


def test_numbers_that_do_not_fit_are_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"shared by 7 ranks: use 91 or 98, or start 6 or 8 ranks"):
        fitting_micro_batches(96, 8, 7)
