"""The tar header reader finds what tarfile finds, and refuses what is damaged, cut or hostile."""

import io
import random
import sys
import tarfile
from pathlib import Path

import pytest
from twins import tar_of

from data_prep.tar_headers import Member, members_in, read_members

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Ranges:
    """What a store gives: slices, but no map of a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __getitem__(self, part: slice) -> bytes:
        return self.data[part]


def read(data: bytes, tmp_path: Path) -> list[Member]:
    """Through the map of a file, and through slices: both must find the same, or refuse with the same words."""
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    found: list = []
    for walk in (lambda: read_members(path), lambda: members_in(Ranges(data), 0, len(data), str(path))):
        try:
            found.append(list(walk()))
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


def of_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [Member(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isreg()]


def some_members(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    draw = random.Random(seed)
    return [
        (f"n{i % 7}/n_{i}.{draw.choice(['jpg', 'cls'])}", draw.randbytes(draw.randrange(1500))) for i in range(count)
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_plain_tars_are_read_as_tarfile_reads_them(format, tmp_path):
    data = tar_of(some_members(2500), format)  # more than two batches
    assert read(data, tmp_path) == of_tarfile(data)


@pytest.mark.parametrize("format", FORMATS)
def test_long_and_odd_names(format, tmp_path):
    names = [
        "a" * 100,
        "d" * 90 + "/" + "f" * 60,
        "./x/y.jpg",
        "with space (1).jpg",
        "x+y=z,@.jpg",
        "n.m/a.b.c.jpg",
        "~a!",
    ]
    if format != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "x.jpg", "é" * 80 + ".jpg", "日本/語.jpg"]
    data = tar_of([*some_members(5), *((name, name.encode()) for name in names), *some_members(5, 1)[:0]], format)
    found = read(data, tmp_path)
    assert found == of_tarfile(data)
    assert all(data[m.offset :][: m.size] == m.name.encode() or not m.name.startswith(("a", "é")) for m in found)


def test_folders_are_passed_over_and_v7_is_known(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("a", tarfile.DIRTYPE), ("a/1.jpg", tarfile.AREGTYPE), ("b/", tarfile.AREGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert [m.name for m in read(buffer.getvalue(), tmp_path)] == ["a/1.jpg"]


def header(name: bytes = b"a.jpg", size: bytes = b"00000000001\0", kind: bytes = b"0", fill: bytes = b"x") -> bytes:
    """One member by hand, with a right checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + fill.ljust(512, b"\0")


END = bytes(10240)


def test_sizes_in_base_256_and_with_blanks(tmp_path):
    large = (b"\x80" + bytes(10) + b"\x05", b"hello")
    data = header(size=large[0], fill=large[1]) + header(b"b.jpg", b"         5 \0", fill=b"there") + END
    assert read(data, tmp_path) == [Member("a.jpg", 512, 5), Member("b.jpg", 1536, 5)]
    assert read(data, tmp_path) == of_tarfile(data)


def extended(record: bytes, kind: bytes = b"x") -> bytes:
    """A pax header with one record; `record` ends with its newline and is shorter than 90 bytes."""
    digits = 2 if len(record) + 2 < 10 else 3
    text = b"%d %s" % (len(record) + digits, record)
    return header(b"p", kind=kind, size=b"%011o\0" % len(text), fill=text)


def test_a_size_of_twelve_digits_is_read_whole(tmp_path):
    data = header(size=b"000000000010", fill=b"12345678") + END
    assert read(data, tmp_path) == of_tarfile(data) == [Member("a.jpg", 512, 8)]


@pytest.mark.parametrize("count", range(1021, 1027))
def test_a_pax_size_holds_for_the_next_member_across_batches(count, tmp_path):
    # The odd name sends the map's reader through the headers one by one, up to the end of a batch.
    before = header(b"~.jpg") + b"".join(header(b"ok%d.jpg" % i) for i in range(count - 1))
    data = before + extended(b"size=5\n") + header(b"last.jpg", fill=b"hello") + END
    assert read(data, tmp_path) == of_tarfile(data)
    long_name = header(b"L", kind=b"L", size=b"00000000006\0", fill=b"q.jpg\0")
    data = before + extended(b"size=5\n") + long_name + header(b"last.jpg", fill=b"hello") + END
    assert read(data, tmp_path)[-1] == Member("q.jpg", len(data) - len(END) - 512, 5)


def test_a_global_comment_is_passed_over(tmp_path):
    data = extended(b"comment=a commit\n", b"g") + header() + END
    assert read(data, tmp_path) == of_tarfile(data) == [Member("a.jpg", 1536, 1)]


def test_folders_without_end_do_not_exhaust_the_stack(tmp_path):
    folder = header(b"d/", kind=b"5", size=b"00000000000\0")[:512]
    path = tmp_path / "x.tar"
    path.write_bytes(folder * (1024 * 200) + header() + END)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(150)
    try:
        assert [member.name for member in read_members(path)] == ["a.jpg"]
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(b"a.pyd.gz"), "may hold a program"),
        (header(b"a.PKL.GZ"), "may hold a program"),
        (header(size=b"0000000zz01\0"), r"'a\.jpg' declares the size .* no number"),
        (header(size=b"00000000_1 \0"), "no number"),
        (header(size=b"\x81" + bytes(10) + b"\x01"), "no number"),
        (extended(b"size=abc\n") + header(), "declares the size b'abc'"),
        (extended(b"size=-5\n") + header(), "declares the size b'-5'"),
        (extended(b"path=../evil.jpg\n", b"g") + header(), "sets the path of all that follow"),
        (extended(b"size=5\n", b"g") + header(), "sets the size of all that follow"),
        (extended(b"GNU.sparse.major=1\n", b"g") + header(), "a sparse file"),
        (header(b"d", kind=b"5", size=b"00000001000\0"), "the folder b'd' declares 512 bytes"),
        (header(b"d/", size=b"00000000001\0"), "the folder b'd/' declares 1 bytes"),
        (header() + extended(b"path=b.jpg\n"), "of no member"),
        (header(b"../x.jpg"), "leads out of its folder"),
        (header(b"a/../../x.jpg"), "leads out of its folder"),
        (header(b"/etc/x.jpg"), "absolute"),
        (header(b"a//x.jpg"), "absolute, or leads"),
        (header(b"a/./x.jpg"), "absolute, or leads"),
        (header(b"pipe:touch x.jpg"), "start a program"),
        (header(b"a/PIPE:touch.jpg"), "start a program"),
        (header(b"a\n.jpg"), "control characters"),
        (header(b"a\\b.jpg"), "backslashes"),
        (header(b"\xff\xfe.jpg"), "not UTF-8"),
        (header(b"a.pyd"), "may hold a program"),
        (header(b"a.PICKLE"), "may hold a program"),
        (header(b"a.b.pth"), "may hold a program"),
        (header(kind=b"1"), "a hard link"),
        (header(kind=b"2"), "a symbolic link"),
        (header(kind=b"3"), "a device"),
        (header(kind=b"4"), "a device"),
        (header(kind=b"6"), "a pipe"),
        (header(kind=b"S"), "a sparse file"),
        (header(kind=b"Z"), "unknown type 'Z'"),
        (header(size=b"77777777777\0"), r"declares 8,589,934,591 bytes"),
        (header(size=b"\x80" + b"\xff" * 11), "declares"),
        (header(size=b"\xff" * 12), "declares -1 bytes"),
        (header(size=b"-0000000001\0"), "no number"),
        (header() + header(), "occurs twice"),
        (header(kind=b"x", size=b"00000000012\0", fill=b"99 path=x\n"), "damaged"),
        (header(kind=b"x", size=b"77777777777\0"), "declares"),
    ],
)
def test_hostile_members_are_refused_by_name(data, words, tmp_path):
    for before in (b"", b"".join(header(b"ok%d.jpg" % i) for i in range(1500))):
        with pytest.raises(ValueError, match=rf"x\.tar.*{words}"):
            read(before + data + END, tmp_path)


def test_a_pax_header_cannot_smuggle_a_name_in(tmp_path):
    for record in (
        b"path=../../x.jpg\n",
        b"path=/x.jpg\n",
        b"path=x.pyd\n",
        b"GNU.sparse.size=5\n",
        b"size=99999999\n",
    ):
        text = b"%d %s" % (len(record) + 3, record)
        data = header(kind=b"x", size=b"%011o\0" % len(text), fill=text) + header() + END
        with pytest.raises(ValueError, match=r"x\.tar"):
            read(data, tmp_path)


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_compressed_tars_are_named(magic, tmp_path):
    with pytest.raises(ValueError, match=r"compressed.*unpack it"):
        read(magic + bytes(2000), tmp_path)


def test_a_cut_at_any_place_is_found(tmp_path):
    data = tar_of(some_members(40))
    end = len(data.rstrip(b"\0"))
    whole = read(data, tmp_path)
    places = set(range(0, len(data), 512)) | {random.Random(0).randrange(len(data)) for _ in range(200)}
    for place in sorted(places):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:place])
        if place >= -(-end // 512) * 512 + 1024:  # only filling is gone
            assert list(read_members(path)) == whole
        else:
            with pytest.raises(ValueError, match=r"cut\.tar"):
                list(read_members(path))


def test_a_flipped_bit_in_a_header_is_found_before_a_member_is_used(tmp_path):
    data = tar_of(some_members(40), tarfile.USTAR_FORMAT)
    whole = read(data, tmp_path)
    draw = random.Random(0)
    for _ in range(400):
        bad = bytearray(data)
        member = draw.choice(whole)
        # The last twelve bytes of a header are filling, and so are blanks of the checksum's own field.
        place = member.offset - 512 + draw.choice([*range(148), *range(149, 154), *range(156, 500)])
        bad[place] ^= 1 << draw.randrange(8)
        path = tmp_path / "bad.tar"
        path.write_bytes(bad)
        try:
            found = list(read_members(path))
        except ValueError as error:
            assert "bad.tar" in str(error)
        else:
            raise AssertionError(f"a flip at {place} passed: {set(found) ^ set(whole)}")


def test_what_follows_the_end_is_refused(tmp_path):
    data = tar_of(some_members(3))
    end = -(-len(data.rstrip(b"\0")) // 512) * 512
    with pytest.raises(ValueError, match="goes on behind its end marker"):
        read(data[: end + 1024] + tar_of(some_members(3)), tmp_path)
    with pytest.raises(ValueError, match="goes on behind its end marker"):  # as `cat a.tar b.tar` makes it
        read(data + tar_of(some_members(3, 1)), tmp_path)
    assert len(read(data + bytes(3_000_000), tmp_path)) == 3
    with pytest.raises(ValueError, match="goes on behind its end marker"):
        read(data + bytes(3_000_000) + b"x", tmp_path)


def test_a_tar_in_a_tar_is_read_in_place(tmp_path):
    inner = [tar_of(some_members(30, seed)) for seed in range(3)]
    data = tar_of([(f"{i}.tar", part) for i, part in enumerate(inner)])
    path = tmp_path / "outer.tar"
    path.write_bytes(data)
    import mmap

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for member, part in zip(read_members(path), inner, strict=True):
            found = list(members_in(mapped, member.offset, member.offset + member.size, "inner"))
            moved = [m._replace(offset=m.offset + member.offset) for m in of_tarfile(part)]
            assert found == moved
        cut = next(read_members(path))
        with pytest.raises(ValueError, match="inner"):
            list(members_in(mapped, cut.offset, cut.offset + cut.size - 10240, "inner"))
