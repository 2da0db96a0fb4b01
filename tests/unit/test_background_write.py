"""One buffer is filled while threads hash and write others: every byte, every error, nothing after its end."""

import errno
import hashlib
import os
import random
import time

import pytest

from data_prep.background_write import BUFFERS, WRITE_BYTES, BackgroundWriter


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 511, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1, 3 * WRITE_BYTES + 4097])
def test_all_bytes_arrive_in_order(tmp_path, size, direct):
    data, random_state = random.Random(size).randbytes(size), random.Random(1)
    with open(tmp_path / "file", "wb") as file, BackgroundWriter(file, direct) as writer:
        place = 0
        while place < size:
            step = random_state.randrange(1, WRITE_BYTES // 2)
            writer.append(data[place : place + step])
            place += step
        writer.finish()
    assert (tmp_path / "file").read_bytes() == data
    assert writer.sha256.digest() == hashlib.sha256(data).digest()


def test_one_append_may_be_larger_than_all_buffers(tmp_path):
    data = random.Random(0).randbytes((BUFFERS + 1) * WRITE_BYTES + 12345)
    with open(tmp_path / "file", "wb") as file, BackgroundWriter(file, direct=True) as writer:
        writer.append(data)
        writer.finish()
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("blocks", [1, BUFFERS])
def test_an_error_of_the_thread_reaches_the_caller(tmp_path, monkeypatch, blocks):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data_prep.background_write.os.write", full)
    with open(tmp_path / "file", "wb") as file, BackgroundWriter(file, direct=False) as writer:
        for _ in range(blocks - 1):
            writer.append(bytes(WRITE_BYTES))
        with pytest.raises(OSError, match="No space left"):
            writer.append(bytes(WRITE_BYTES))  # where no buffer is free it waits, and learns of the error
            assert blocks == 1
            writer.finish()


def test_nothing_is_written_after_an_error_has_left_the_block(tmp_path, monkeypatch):
    real, ended = os.write, []

    def slow(descriptor, data):
        time.sleep(0.3)
        ended.append(len(data))
        return real(descriptor, data)

    monkeypatch.setattr("data_prep.background_write.os.write", slow)
    with (
        pytest.raises(KeyboardInterrupt),
        open(tmp_path / "file", "wb") as file,
        BackgroundWriter(file, direct=False) as writer,
    ):
        writer.append(bytes(WRITE_BYTES))
        raise KeyboardInterrupt
    assert ended == [WRITE_BYTES]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer._descriptor)
