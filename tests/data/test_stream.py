"""Tar shards as a stream: what is found, in which order, from which position, and what is left out."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import pocketvlm.data.stream as stream_module
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.shards import Shard, ShardOrder, list_shards
from pocketvlm.data.stream import Position, SampleStream, Tally
from pocketvlm.edge.errors import BadSampleError, UsageError

JPEG = b"\xff\xd8\xff picture \xff\xd9"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, samples: int = 6) -> list[Shard]:
    """Shards of img2dataset's layout; every sample has its own caption."""
    for number in range(shards):
        members = []
        for index in range(samples):
            key = f"{number:03}{index:03}"
            meta = json.dumps({"caption": f"caption {key}", "width": 1}).encode()
            members += [(f"{key}.jpg", JPEG), (f"{key}.txt", f"caption {key}".encode()), (f"{key}.json", meta)]
        write_tar(folder / f"s-{number:03}.tar", members)
    return list_shards(str(folder))


def reader(shards: list[Shard], slot: int = 0, slots: int = 1, order: str = "shuffled", **how: Any) -> SampleStream:
    return SampleStream(shards, ShardOrder(len(shards), slot=slot, slots=slots, order=order, seed=3), **how)


def first_epochs(stream: SampleStream, epochs: int) -> dict[int, list[str]]:
    """uids by epoch, up to the first sample of the epoch after the last that is asked for."""
    found: dict[int, list[str]] = {epoch: [] for epoch in range(epochs)}
    for drawn in stream:
        if drawn.epoch >= epochs:
            return found
        assert drawn.sample is not None
        found[drawn.epoch].append(drawn.sample.uid)
    raise AssertionError("a stream has no end")


def one_shard(shards: list[Shard], **how: Any) -> tuple[list[str], Tally]:
    """uids of a sequential pass over the shards, and what was counted."""
    stream = reader(shards, order="sequential", **how)
    uids = [sample.uid for sample in stream.once()]
    return uids, stream.tally


# --- which shards ---------------------------------------------------------------------------------------------


def test_shards_are_named_by_pattern_folder_glob_list_url_and_command(tmp_path: Path) -> None:
    write_shards(tmp_path / "cc", 3)
    names = ["cc/s-000", "cc/s-001", "cc/s-002"]
    for spec in (f"{tmp_path}/cc/s-{{000..002}}.tar", f"{tmp_path}/cc", f"{tmp_path}/cc/*.tar"):
        assert [shard.name for shard in list_shards(spec)] == names
    (tmp_path / "list.txt").write_text("# two of three\ncc/s-000.tar\n\npipe:cat cc/s-{001..002}.tar | cat\n")
    found = list_shards(str(tmp_path / "list.txt"))
    assert [shard.name for shard in found] == names
    assert found[2].place == "pipe:cat cc/s-002.tar | cat"
    found = list_shards(("https://host/a/cc/{00..01}.tar?key=1", "pipe:tool {x} s3://b/cc/7.tar -"))
    assert [shard.name for shard in found] == ["cc/00", "cc/01", "cc/7"]
    assert found[2].place.startswith("pipe:tool {x}"), "braces of a command are the shell's"


def test_shards_that_cannot_be_told_apart_or_reached_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "a" / "cc", 1)
    write_shards(tmp_path / "b" / "cc", 1)
    with pytest.raises(UsageError, match=r"both called 'cc/s-000'.*told apart"):
        list_shards((f"{tmp_path}/a/cc", f"{tmp_path}/b/cc"))
    with pytest.raises(UsageError, match="does not exist"):
        list_shards(f"{tmp_path}/none.tar")
    with pytest.raises(UsageError, match=r"an address of a kind that is not read.*pipe:COMMAND"):
        list_shards("s3://bucket/{000..003}.tar")
    with pytest.raises(UsageError, match=r"list of shards .*none\.txt cannot be read"):
        list_shards(f"{tmp_path}/none.txt")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(UsageError, match="names no tar shard"):
        list_shards(f"{tmp_path}/empty.txt")


# --- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_every_epoch_has_every_sample_once_over_all_readers(tmp_path: Path, order: str, slots: int) -> None:
    shards = write_shards(tmp_path / "cc", 5, samples=3)
    everything = sorted(f"cc/s-{n:03}/{n:03}{i:03}" for n in range(5) for i in range(3))
    readers = [first_epochs(reader(shards, slot, slots, order, buffer=4), 3) for slot in range(slots)]
    for epoch in range(3):
        together = [uid for found in readers for uid in found[epoch]]
        assert sorted(together) == everything, "nothing twice, nothing missing"
    # nobody has more than one shard more than another, however many epochs pass
    sizes = [sum(map(len, found.values())) for found in readers]
    assert max(sizes) - min(sizes) <= 3


def test_an_epoch_is_another_order_and_the_seed_decides(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "cc", 6, samples=4)
    found = first_epochs(reader(shards, buffer=4), 2)
    assert found[0] != found[1]
    assert found == first_epochs(reader(shards, buffer=4), 2)
    other = SampleStream(shards, ShardOrder(6, slot=0, slots=1, order="shuffled", seed=4), buffer=4)
    assert first_epochs(other, 1)[0] != found[0]
    in_order = first_epochs(reader(shards, order="sequential"), 1)[0]
    assert in_order == sorted(in_order)


def test_resampled_shards_are_drawn_with_replacement() -> None:
    order = ShardOrder(10, slot=0, slots=1, order="resampled", seed=0)
    counts = Counter(order.shard(turn)[1] for turn in range(2000))
    assert set(counts) == set(range(10))
    assert len({order.shard(turn)[1] for turn in range(10)}) < 10
    # 5 standard deviations of a binomial count with mean 200
    assert all(abs(count - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5 for count in counts.values())


def test_unknown_orders_and_readers_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown order of shards 'shufled'; did you mean 'shuffled'"):
        ShardOrder(2, slot=0, slots=1, order="shufled", seed=0)
    with pytest.raises(UsageError, match="reader 2 of 2 does not exist"):
        ShardOrder(2, slot=2, slots=2, order="shuffled", seed=0)


# --- positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [0, 3, 100])
def test_a_stream_continues_exactly_from_any_position(tmp_path: Path, buffer: int) -> None:
    shards = write_shards(tmp_path / "cc", 4, samples=5)
    write_tar(tmp_path / "cc" / "s-001.tar", [("x.jpg", JPEG), ("y.jpg", JPEG), ("y.txt", b"y"), ("y.txt", b"z")])
    whole = reader(shards, 1, 2, buffer=buffer)
    row = list(islice(whole, 25))
    for at in (1, 4, 5, 9, 12, 24):
        part = reader(shards, 1, 2, buffer=buffer)
        before = list(islice(part, at))
        told = part.take_tally()
        rest = reader(shards, 1, 2, buffer=buffer, start=before[-1].position)
        assert [*before, *islice(rest, 25 - at)] == row
        told.add(rest.tally)
        assert told.to_dict() == whole.tally.to_dict(), "what is read again is not counted again"


def test_continuing_opens_the_current_shard_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "cc", 50, samples=4)
    opened: list[str] = []
    real = stream_module.open_shard
    monkeypatch.setattr(stream_module, "open_shard", lambda shard: opened.append(shard.name) or real(shard))
    stream = reader(shards, buffer=2, start=Position(turn=33, drawn=3))
    drawn = next(iter(stream))
    assert opened == [shards[stream.order.shard(33)[1]].name]
    assert drawn.position == Position(33, 4)


def test_a_shard_that_became_shorter_is_counted(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "cc", 1, samples=4)
    stream = reader(shards, start=Position(0, 9))
    assert next(iter(stream)).position == Position(1, 1)
    assert stream.tally.report.counts == {"changed-shard": 1}


# --- what is of no use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["inside", "between", "header"])
def test_a_truncated_tar_keeps_what_came_before_and_is_counted(tmp_path: Path, cut: str) -> None:
    shards = write_shards(tmp_path / "cc", 2, samples=4)
    path = Path(shards[0].place)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[9]  # the fourth sample's picture
    where = {"inside": last.offset_data + 3, "between": last.offset, "header": last.offset + 100}[cut]
    path.write_bytes(path.read_bytes()[:where])
    uids, tally = one_shard(shards)
    # at a break inside a member nobody knows whether the key before it had another; the shard after it is whole
    kept = ["000000", "000001", *(["000002"] if cut != "inside" else [])]
    assert [uid.rpartition("/")[2] for uid in uids] == kept + [f"00100{i}" for i in range(4)]
    assert tally.report.counts == {"truncated-archive": 1}
    assert (tally.shards, tally.bad_shards) == (2, 1)


def test_a_damaged_header_does_not_pass_for_the_end(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "cc", 1, samples=4)
    path = Path(shards[0].place)
    with tarfile.open(path) as archive:
        where = archive.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[where + 150] ^= 0x10  # in the checksum of the header
    path.write_bytes(data)
    uids, tally = one_shard(shards)
    assert len(uids) == 2
    assert tally.report.counts == {"truncated-archive": 1}


def test_a_file_that_is_no_tar_and_an_empty_one_are_counted(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "cc", 4, samples=2)
    Path(shards[0].place).write_bytes(b"<html>404</html>" * 100)
    Path(shards[1].place).write_bytes(b"")
    write_tar(Path(shards[2].place), [("README", b"hello")])
    uids, tally = one_shard(shards)
    assert len(uids) == 2
    assert tally.report.counts == {"truncated-archive": 2, "empty-shard": 1}
    Path(shards[3].place).unlink()
    uids, tally = one_shard(shards)
    assert uids == []
    assert tally.report.counts["unreadable-shard"] == 1


def test_unsafe_members_are_never_read(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "cc" / "s.tar", [("a.jpg", JPEG), ("a.txt", b"a"), ("../b.jpg", JPEG), ("/c.jpg", JPEG)]
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        device = tarfile.TarInfo("e.jpg")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
        long = tarfile.TarInfo("f.txt")
        long.size = (1 << 20) + 1
        archive.addfile(long, io.BytesIO(bytes(long.size)))
    uids, tally = one_shard(list_shards(str(path)))
    assert uids == ["cc/s/a"]
    assert tally.report.counts == {"unsafe-member": 4, "too-large-member": 1}
    assert tally.bad_samples == 0


def test_duplicate_keys_and_members_are_left_out_and_counted(tmp_path: Path) -> None:
    first = [("a.jpg", JPEG), ("a.txt", b"one"), ("a.txt", b"two"), ("b.jpg", JPEG), ("b.txt", b"bee")]
    path = write_tar(tmp_path / "cc" / "s.tar", [*first, ("a.jpg", JPEG), ("a.json", b"{}"), ("c.jpg", JPEG)])
    stream = reader(list_shards(str(path)), captions="optional")
    samples = list(stream.once())
    assert [(s.uid, [c.text for c in s.captions]) for s in samples] == [
        ("cc/s/a", ["one"]),
        ("cc/s/b", ["bee"]),
        ("cc/s/c", []),
    ]
    assert stream.tally.report.counts == {"duplicate-member": 1, "duplicate-key": 2}


def test_missing_and_unreadable_captions_are_counted(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("b.jpg", JPEG), ("b.txt", b"  "), ("c.jpg", JPEG), ("c.txt", b"\xff\xfe\x00")]
    members += [
        ("d.jpg", JPEG),
        ("d.json", b"{nonsense"),
        ("e.txt", b"no picture"),
        ("f.jpg", JPEG),
        ("f.txt", b"good"),
    ]
    shards = list_shards(str(write_tar(tmp_path / "cc" / "s.tar", members)))
    uids, tally = one_shard(shards)
    assert uids == ["cc/s/f"]
    expected = {"no-caption": 1, "empty-text": 1, "unreadable-text": 2, "no-image-member": 1}
    assert tally.report.counts == expected
    assert tally.bad_samples == 5
    uids, tally = one_shard(shards, captions="optional")
    assert uids == ["cc/s/a", "cc/s/f"], "captions that are all bad are no missing caption"
    with pytest.raises(BadSampleError, match="no caption"):
        one_shard(shards, on_bad_sample="refuse")


def test_several_captions_keep_their_weights(tmp_path: Path) -> None:
    meta = {"caption": "plain", "captions": [{"text": "rewrite", "weight": 0.25, "source": "rewrite"}, "third"]}
    members = [("a.jpg", JPEG), ("a.txt", b"rewrite"), ("a.json", json.dumps(meta).encode())]
    stream = reader(list_shards(str(write_tar(tmp_path / "cc" / "s.tar", members))))
    (sample,) = stream.once()
    found = [(caption.text, caption.weight, caption.source) for caption in sample.captions]
    assert found == [("plain", 1.0, "original"), ("rewrite", 0.25, "rewrite"), ("third", 1.0, "original")]


def test_too_many_bad_samples_stop_the_run() -> None:
    tally = Tally(samples=199, bad_samples=150)
    for number in range(150):
        tally.report.note("no-caption", f"cc/s:{number}")
    tally.check(0.05)  # too few to say
    tally.samples += 1
    with pytest.raises(UsageError, match=r"150 of 200 samples were of no use \(150 x no-caption; first cc/s:0\)"):
        tally.check(0.05)
    tally.check(0.75)
    shards = Tally(shards=20, bad_shards=20)
    shards.report.note("unreadable-shard", "x.tar")
    with pytest.raises(UsageError, match="20 of 20 shards were of no use"):
        shards.check(1.0)
    assert Tally.from_dict(json.loads(json.dumps(tally.to_dict()))).to_dict() == tally.to_dict()
    assert isinstance(tally.report, BadSampleReport)


# --- pipes and addresses --------------------------------------------------------------------------------------


def test_a_pipe_is_read_and_its_failure_is_the_shards(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path / "cc", 1, samples=3)[0].place)
    uids, tally = one_shard(list_shards(f"pipe:cat {path}"))
    assert len(uids) == 3
    assert not tally.report.counts
    # all samples came, and the status still counts
    uids, tally = one_shard(list_shards(f"pipe:cat {path} && echo gone away >&2 && exit 3"))
    assert len(uids) == 3
    assert tally.report.counts == {"failed-pipe": 1}
    uids, tally = one_shard(list_shards(f"pipe:head -c 3000 {path}"))
    assert tally.report.counts == {"truncated-archive": 1}
    with pytest.raises(BadSampleError, match=r"its command ended with status 3 \(gone away\)"):
        one_shard(list_shards(f"pipe:cat {path} && echo gone away >&2 && exit 3"), on_bad_sample="refuse")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of tmp_path that sends the first half of every file whose address says so."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            data = source.read()
            outputfile.write(data[: len(data) // 2] if "half" in self.path else data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_is_read_and_a_broken_connection_is_the_shards(tmp_path: Path, address: str) -> None:
    write_shards(tmp_path / "cc", 2, samples=3)
    uids, tally = one_shard(list_shards(f"{address}/cc/s-{{000..001}}.tar"))
    assert uids == [f"cc/s-{n:03}/{n:03}{i:03}" for n in range(2) for i in range(3)]
    assert not tally.report.counts
    _, tally = one_shard(list_shards((f"{address}/cc/s-000.tar?half", f"{address}/cc/none.tar")))
    assert tally.report.counts == {"truncated-archive": 1, "unreadable-shard": 1}
