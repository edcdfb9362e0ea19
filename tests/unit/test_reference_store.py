"""What a store of reference scores gives back: what was put in, bit by bit, or nothing, whatever befell its files."""

from __future__ import annotations

import json
import os
import random
import resource
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.reference_store.folder import count_store, is_store, prepare_store, store_violations
from megatron_powerflow.reference_store.index import ENTRY_BYTES
from megatron_powerflow.reference_store.store import ReferenceStore, ScoredPass

BASE, OTHER_BASE = b"b" * 32, b"o" * 32


def name_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def scored(number: int, size: int = 7) -> ScoredPass:
    values = -np.abs(np.random.default_rng(number).standard_normal(size)).astype(np.float32)
    return ScoredPass(name_of(number), values, 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    prepare_store(tmp_path / "deep" / "store", tmp_path / "run")
    return tmp_path / "deep" / "store"


def filled(folder: Path, *numbers: int) -> ReferenceStore:
    store = ReferenceStore(folder, BASE)
    for number in numbers:
        store.add([scored(number)])
    return store


def found(store: ReferenceStore, number: int) -> bool:
    """Whether the pass is known; then with exactly its values."""
    values = store.find(name_of(number), 7)
    if values is None:
        return False
    assert values.dtype == np.float32
    assert values.tobytes() == scored(number).log_probs.tobytes()
    return True


def files(folder: Path) -> tuple[Path, Path]:
    """(index, values) of the one process that has written."""
    return next(folder.glob("*.index")), next(folder.glob("*.values"))


def test_what_was_added_comes_back_bit_by_bit_to_its_base_alone(folder):
    store = ReferenceStore(folder, BASE)
    assert not [*folder.glob("*.index")], "a run that adds nothing leaves no files"
    store.add([scored(1), scored(2)])
    store.add([scored(2), scored(3)])
    again = ReferenceStore(folder, BASE)
    assert len(again) == 3, "what is known is not written again"
    assert all(found(one, number) for one in (store, again) for number in (1, 2, 3))
    assert again.find(name_of(4), 7) is None
    assert len(ReferenceStore(folder, OTHER_BASE)) == 0


def test_runs_that_go_on_at_the_same_time_find_what_the_others_have_added(folder):
    stores = [ReferenceStore(folder, BASE) for _ in range(4)]

    def fill(place: int) -> None:
        for number in range(place, 80, len(stores)):
            stores[place].add([scored(number), scored(1000)])

    threads = [threading.Thread(target=fill, args=(place,)) for place in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.refresh()
        assert all(found(store, number) for number in (*range(80), 1000))
    (count,), notes = count_store(folder)
    assert (count.num_passes, count.num_responses, count.num_tokens, notes) == (81, 162, 81 * 7, [])


def test_an_end_torn_at_any_byte_costs_the_last_pass_alone(folder):
    filled(folder, 1, 2)
    for path, least in zip(files(folder), (ENTRY_BYTES, 4 * 7), strict=True):
        whole = path.read_bytes()
        for length in range(least, len(whole)):
            path.write_bytes(whole[:length])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                store = ReferenceStore(folder, BASE)
                assert (found(store, 1), found(store, 2)) == (True, False)
        path.write_bytes(whole)
    store = ReferenceStore(folder, BASE)
    assert found(store, 2)


def test_damage_costs_what_it_hit_and_is_named(folder):
    """500 times: up to four bytes changed, cut out or put in, anywhere in the two files."""
    filled(folder, *range(6))
    contents = [path.read_bytes() for path in files(folder)]
    draw, lost = random.Random(0), 0
    for _ in range(500):
        place = draw.randrange(2)
        path, content = files(folder)[place], bytearray(contents[place])
        moved = draw.random() < 0.2
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            if moved:
                content[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
            else:
                content[at] ^= draw.randrange(1, 256)
        path.write_bytes(bytes(content))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = ReferenceStore(folder, BASE)
            known = [found(store, number) for number in range(6)]
        lost += known.count(False)
        assert moved or known.count(False) <= 4
        assert all(str(path.with_suffix("")) in str(each.message) for each in caught)
        if not moved and not all(known):
            assert caught, "an entry was left out in silence"
        path.write_bytes(contents[place])
    assert lost > 200


def test_numbers_that_are_no_log_probs_are_neither_kept_nor_believed(folder):
    store = ReferenceStore(folder, BASE)
    bad = [np.array([-1, value], np.float32) for value in (np.nan, -np.inf, 0.5)]
    store.add([ScoredPass(name_of(number), values, 1) for number, values in enumerate(bad)])
    assert len(store) == 0
    import megatron_powerflow.reference_store.store as module

    module.storable, original = (lambda values: True), module.storable
    try:
        store.add([ScoredPass(name_of(9), bad[0], 1)])  # as whoever fakes an entry would
    finally:
        module.storable = original
    with pytest.warns(RuntimeWarning, match="left out"):
        assert ReferenceStore(folder, BASE).find(name_of(9), 2) is None


def test_a_full_disk_is_an_error_that_names_the_file_and_loses_nothing(folder):
    store = filled(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\.values"):
            store.add([scored(2, size=100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.add([scored(3)])
    again = ReferenceStore(folder, BASE)
    assert [found(again, number) for number in (1, 3)] == [True, True]


def test_what_lies_in_a_store_and_is_not_ours_is_passed_over(folder, tmp_path):
    filled(folder, 1)
    pipe, device, gone, below, text, endless = (folder / f"{digit * 32}.index" for digit in "abcdef")
    with endless.open("wb") as file:
        file.truncate(2**40)  # without a byte of it on the disk
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    gone.symlink_to(tmp_path / "nothing")
    below.mkdir()
    text.write_text("notes of mine\n" * 40)
    (folder / "notes.index").write_text("notes of mine\n" * 40)
    with pytest.warns(RuntimeWarning) as caught:
        store = ReferenceStore(folder, BASE)
    assert found(store, 1)
    assert {str(each.message).partition(":")[0] for each in caught} == {str(gone), str(below), str(text), str(endless)}
    (count,), notes = count_store(folder)
    assert count.num_passes == 1
    assert {note.partition(":")[0] for note in notes} == {
        str(path) for path in (pipe, device, gone, below, text, endless)
    }
    assert text.read_text().startswith("notes of mine")


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    run = tmp_path / "run"
    foreign = tmp_path / "papers"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "store.json").write_text(json.dumps({"holds": "reference scores of megatron_powerflow", "format": 2}))
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "store.json").write_text("[" * 100_000)
    for folder, words in (
        (foreign, "holds other files and no store (thesis.tex)"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "no folder that can be written"),
        (newer, "is of format 2"),
        (hostile, "holds other files and no store (store.json)"),
        (run, "lie in one another"),
        (run / "store", "lie in one another"),
        (tmp_path, "lie in one another"),
    ):
        (text,) = store_violations(folder, run)
        assert words in text
        assert text.startswith(f"model.reference_store={str(folder)!r}")
        with pytest.raises(UserError):
            prepare_store(folder, run)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    assert not run.exists()
    (tmp_path / "empty").mkdir()
    assert not store_violations(tmp_path / "empty", run)
    assert not is_store(tmp_path / "empty"), "a check makes nothing"
