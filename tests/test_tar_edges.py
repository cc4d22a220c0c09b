"""Archives at the edges of the format: sizes, names and KEYs that tar allows and people make."""
import json
import tarfile

import samples

import data
from formats import records


def test_a_member_of_whole_blocks_a_key_twice_and_txt_beside_json(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i, name in enumerate("0112"):
            samples.add(tar, f"{name}.json", json.dumps({"caption": str(i)}).encode().ljust(512))
            samples.add(tar, f"{name}.jpg", samples.jpeg(i) + bytes(-len(samples.jpeg(i)) % 512))
            samples.add(tar, f"{name}.txt", b"not this")
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert len(reader) == 4
    for i in range(4):
        picture, said = reader.record(i)
        assert said == {"unknown": [str(i)]} and picture.startswith(samples.jpeg(i))


def test_a_caption_file_is_read_without_its_mark_and_line_end_also_in_an_archive_in_capitals(tmp_path):
    with tarfile.open(tmp_path / "A.TAR", "w") as tar:
        samples.add(tar, "0.jpg", samples.jpeg(0))
        samples.add(tar, "0.txt", "\ufeffa dog\r\n".encode())
    assert data.image_files([f"{tmp_path}/A.TAR@en"], 32).readers[0].record(0)[1] == {"en": ["a dog"]}


def test_a_long_name_whose_member_is_damaged_goes_to_no_other(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("x" * 150 + ".jpg", "1.jpg"):
            samples.add(tar, name, samples.jpeg(1))
        samples.add(tar, "1.txt", b"one")
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[1024:1100] = b"?" * 76                                               # after the header of the name and the name
    (tmp_path / "a.tar").write_bytes(raw)
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert len(reader) == 2 and reader.record(1) == (samples.jpeg(1), {"unknown": ["one"]})


def test_headers_of_gnu_and_of_sizes_that_cannot_be():
    def head(size, prefix=b""):
        made = bytearray((b"a".ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 12 + b" " * 8 + b"0" + bytes(100)
                          + b"ustar  \0".ljust(88, b"\0") + prefix).ljust(512, b"\0"))
        made[148:156] = b"%06o\0 " % sum(made)
        return records.header(bytes(made))
    assert head(b"\x80" + (9 << 30).to_bytes(11, "big")).size == 9 << 30
    assert head(b"%011o\0" % 7, prefix=b"times, in GNU's form").name == "a"
    assert head(b"\x80" + b"\xff" * 11) is None and head(b"-0000001000\0") is None
