"""The rules of the store, for both that there are; and a machine that lives every history of claims, with crashes.

The rules are numbered in proxy/batches/store.py.
"""

import asyncio
import sqlite3
import stat
import tempfile
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.batches import sqlite as sqlite_store
from proxy.batches.memory import MemoryStore
from proxy.batches.sqlite import FILE, SqliteStore
from proxy.batches.store import Page
from proxy.core.batch import Batch, File, Handed, Line, NotPossible, Result, Status
from proxy.core.usage import Usage
from proxy.errors import StateOff, StateUnavailable

DAY = 86_400.0
KEEP = 30 * DAY


def batch(batch_id="batch_1", owner="team", **said):
    told = {
        "endpoint": "/v1/chat/completions",
        "input_file_id": f"file-in-{batch_id}",
        "output_file_id": f"file-out-{batch_id}",
        "error_file_id": f"file-err-{batch_id}",
        "created_at": 100,
        "expires_at": 100 + int(DAY),
    }
    return Batch(id=batch_id, owner=owner, **told | said)


def upload(file_id="file-1", owner="team", **said):
    told = {"purpose": "batch", "filename": "in.jsonl", "bytes": 10, "created_at": 100}
    return File(id=file_id, owner=owner, **told | said)


def lines(count):
    return [Line(number, number * 10, 9, f"c-{number}") for number in range(1, count + 1)]


def done(text="ok", used=None):
    return Result(True, text.encode() + b"\n", used)


def failed(text="bad"):
    return Result(False, text.encode() + b"\n")


@asynccontextmanager
async def sqlite(path):
    store = await asyncio.to_thread(SqliteStore.opened, path)
    try:
        yield store
    finally:
        await store.aclose()


@asynccontextmanager
async def memory(path):
    yield MemoryStore()


@pytest.fixture(params=[memory, sqlite], ids=["memory", "sqlite"])
async def store(request, tmp_path):
    async with request.param(tmp_path / "state") as opened:
        yield opened


async def started(store, count, batch_id="batch_1", **said):
    """A batch in progress with so many items."""
    await store.create(batch(batch_id, **said))
    await store.fill(batch_id, lines(count))
    return await store.move(batch_id, Status.IN_PROGRESS, 110.0, total=count, model="m")


async def output(store, batch_id="batch_1", *, done=True):
    return [text for _, text in await store.lines(batch_id, done=done, after=0, most_bytes=1 << 30)]


# ── files ──


async def test_a_file_is_found_by_its_owner_alone(store):
    await store.add_file(upload())
    assert await store.file("team", "file-1") == upload()
    assert await store.file("other", "file-1") is None
    assert await store.file("", "file-1") is None
    assert await store.files("other", Page()) == []
    assert not await store.remove_file("other", "file-1")
    assert await store.remove_file("team", "file-1")
    assert await store.file("team", "file-1") is None
    assert not await store.remove_file("team", "file-1")


async def test_files_are_listed_in_pages_both_ways_and_by_purpose(store):
    for number in range(5):
        await store.add_file(upload(f"file-{number}", purpose="batch_output" if number == 2 else "batch"))
    ids = [file.id for file in await store.files("team", Page())]
    assert ids == [f"file-{number}" for number in (4, 3, 2, 1, 0)]
    page = Page(after="file-3", limit=2)
    assert [file.id for file in await store.files("team", page)] == ["file-2", "file-1"]
    assert [file.id for file in await store.files("team", replace(page, newest_first=False))] == ["file-4"]
    assert [file.id for file in await store.files("team", Page(), "batch_output")] == ["file-2"]
    assert await store.files("team", Page(after="nowhere")) == []


async def test_the_bytes_of_an_open_batch_are_needed_after_their_file_was_deleted(store):
    await store.add_file(upload("file-in-batch_1"))
    await store.add_file(upload("file-other"))
    await started(store, 1)
    await store.remove_file("team", "file-in-batch_1")
    assert await store.needed() == {"file-in-batch_1", "file-other"}
    await store.finish((await store.claim("batch_1", 1, 500.0))[0], done(), 120.0)
    await store.close("batch_1", Status.COMPLETED, 120.0)
    assert await store.needed() == {"file-other"}


# ── steps ──


async def test_what_steps_gave_is_kept_with_their_item_until_it_has_ended(store):
    await started(store, 2)
    first, second = await store.claim("batch_1", 2, 500.0)
    await store.keep_step(first, "extract", b"facts")
    await store.keep_step(first, "each/0", b"a")
    await store.keep_step(first, "each/0", b"b")
    assert await store.steps(first) == {"extract": b"facts", "each/0": b"b"}
    assert await store.steps(second) == {}
    await store.release([first])
    await store.keep_step(first, "late", b"of a claim that is not in force")
    (again,) = await store.claim("batch_1", 1, 500.0)
    assert await store.steps(again) == {"extract": b"facts", "each/0": b"b"}
    await store.finish(again, done(), 120.0)
    assert await store.steps(again) == {}
    await store.keep_step(second, "extract", b"facts")
    await store.move("batch_1", Status.CANCELLING, 130.0)
    await store.close("batch_1", Status.CANCELLED, 130.0)
    assert await store.steps(second) == {}


async def test_steps_outlive_the_process(tmp_path):
    async with sqlite(tmp_path) as store:
        await started(store, 1)
        (item,) = await store.claim("batch_1", 1, 500.0)
        await store.keep_step(item, "extract", b"facts")
    async with sqlite(tmp_path) as store:
        (again,) = await store.claim("batch_1", 1, 500.0)
        assert again.attempt == 2
        assert await store.steps(again) == {"extract": b"facts"}


async def test_state_of_the_first_version_is_brought_to_this_one(tmp_path):
    db = sqlite3.connect(tmp_path / FILE)
    db.executescript(f"{sqlite_store._SCHEMA[0]} PRAGMA user_version = 1;")
    db.close()
    async with sqlite(tmp_path) as store:
        await started(store, 1)
        (item,) = await store.claim("batch_1", 1, 500.0)
        await store.keep_step(item, "extract", b"facts")
        assert await store.steps(item) == {"extract": b"facts"}


# ── batches ──


async def test_a_batch_is_found_by_its_owner_alone(store):
    await store.create(batch())
    assert await store.batch("team", "batch_1") == batch()
    assert await store.batch("other", "batch_1") is None
    assert await store.batches("other", Page()) == []
    assert await store.batches("team", Page()) == [batch()]


async def test_batches_are_listed_newest_first_in_pages(store):
    for number in range(4):
        await store.create(batch(f"batch_{number}"))
    assert [each.id for each in await store.batches("team", Page(after="batch_3", limit=2))] == ["batch_2", "batch_1"]
    assert await store.batches("team", Page(after="batch_0")) == []


async def test_a_batch_moves_only_where_its_state_allows_and_remembers_when(store):
    await store.create(batch())
    with pytest.raises(NotPossible):
        await store.move("batch_1", Status.COMPLETED, 105.0)
    moved = await store.move("batch_1", Status.IN_PROGRESS, 110.9, total=3, model="m")
    assert (moved.status, moved.entered, moved.total, moved.model) == (
        Status.IN_PROGRESS,
        {"in_progress": 110},
        3,
        "m",
    )
    await store.move("batch_1", Status.CANCELLING, 120.0)
    with pytest.raises(NotPossible, match="cancelling and cannot become expired"):
        await store.close("batch_1", Status.EXPIRED, 130.0)
    ended = await store.close("batch_1", Status.CANCELLED, 140.0)
    assert ended.entered == {"in_progress": 110, "cancelling": 120, "cancelled": 140}
    assert await store.batch("team", "batch_1") == ended
    assert await store.open_batches() == []


async def test_open_batches_are_those_of_all_owners_oldest_first(store):
    for number, owner in enumerate(("team", "", "team")):
        await store.create(batch(f"batch_{number}", owner))
    await store.move("batch_2", Status.FAILED, 120.0)
    assert [each.id for each in await store.open_batches()] == ["batch_0", "batch_1"]


# ── items ──


async def test_items_are_claimed_once_in_the_order_of_their_lines(store):
    await started(store, 5)
    first = await store.claim("batch_1", 2, 500.0)
    assert [(item.line, item.attempt, item.start, item.length, item.custom_id) for item in first] == [
        (1, 1, 10, 9, "c-1"),
        (2, 1, 20, 9, "c-2"),
    ]
    assert [item.line for item in await store.claim("batch_1", 9, 500.0)] == [3, 4, 5]
    assert await store.claim("batch_1", 9, 500.0) == []


async def test_nothing_is_claimed_of_a_batch_that_is_not_in_progress(store):
    await store.create(batch())
    await store.fill("batch_1", lines(2))
    assert await store.claim("batch_1", 2, 500.0) == []
    await store.move("batch_1", Status.IN_PROGRESS, 110.0, total=2)
    await store.move("batch_1", Status.CANCELLING, 120.0)
    assert await store.claim("batch_1", 2, 500.0) == []


async def test_the_same_lines_filled_in_again_change_nothing(store):
    await store.create(batch())
    await store.fill("batch_1", lines(2))
    await store.fill("batch_1", lines(3))
    await store.move("batch_1", Status.IN_PROGRESS, 110.0, total=3)
    assert [item.line for item in await store.claim("batch_1", 9, 500.0)] == [1, 2, 3]


async def test_a_claim_given_back_is_claimed_again_under_another_number(store):
    await started(store, 1)
    (before,) = await store.claim("batch_1", 1, 500.0)
    await store.release([before])
    (after,) = await store.claim("batch_1", 1, 500.0)
    assert (before.attempt, after.attempt) == (1, 2)
    await store.release([before])  # not in force any more
    assert await store.claim("batch_1", 1, 500.0) == []
    assert await store.finish(before, done("late"), 120.0) is None
    assert await store.finish(after, done("right"), 120.0) == 0
    assert await output(store) == [b"right\n"]


async def test_result_state_and_counts_are_one(store):
    await started(store, 3)
    one, two, three = await store.claim("batch_1", 3, 500.0)
    assert await store.finish(two, done("two", Usage(5, 7, 1, 0, 2)), 120.0) == 2
    assert await store.finish(one, failed("one"), 121.0) == 1
    now = await store.batch("team", "batch_1")
    assert (now.status, now.completed, now.failed, now.pending) == (Status.IN_PROGRESS, 1, 1, 1)
    assert await store.finish(three, done("three", Usage(1, 1)), 122.0) == 0
    now = await store.batch("team", "batch_1")
    assert (now.status, now.completed, now.failed, now.used) == (Status.FINALIZING, 2, 1, Usage(6, 8, 1, 0, 2))
    assert now.entered["finalizing"] == 122
    assert await output(store) == [b"two\n", b"three\n"]
    assert await output(store, done=False) == [b"one\n"]


async def test_a_result_is_taken_once(store):
    await started(store, 2)
    one, _ = await store.claim("batch_1", 2, 500.0)
    assert await store.finish(one, done("first"), 120.0) == 1
    assert await store.finish(one, failed("second"), 120.0) is None
    assert (await store.batch("team", "batch_1")).completed == 1
    assert await output(store) == [b"first\n"]


async def test_results_are_a_file_from_the_first_on_and_it_grows(store):
    await started(store, 3)
    one, two, _ = await store.claim("batch_1", 3, 500.0)
    assert await store.file("team", "file-out-batch_1") is None
    await store.finish(one, done("12345"), 120.0)
    file = await store.file("team", "file-out-batch_1")
    assert (file.purpose, file.bytes, file.created_at, file.batch) == ("batch_output", 6, 120, "batch_1")
    await store.finish(two, done("12"), 125.0)
    assert (await store.file("team", "file-out-batch_1")).bytes == 9
    assert await store.file("team", "file-err-batch_1") is None
    assert await store.file("other", "file-out-batch_1") is None


async def test_results_are_read_in_parts(store):
    await started(store, 5)
    for item in reversed(await store.claim("batch_1", 5, 500.0)):
        await store.finish(item, done("x" * 9), 120.0)
    part = await store.lines("batch_1", done=True, after=0, most_bytes=20)
    assert [line for line, _ in part] == [1, 2]
    assert [line for line, _ in await store.lines("batch_1", done=True, after=2, most_bytes=1)] == [3]
    assert await store.lines("batch_1", done=True, after=5, most_bytes=20) == []


async def test_what_has_not_ended_fails_when_the_batch_closes_and_what_has_is_kept(store):
    await started(store, 3, output_seconds=3600)
    one, two = await store.claim("batch_1", 2, 500.0)
    await store.finish(one, done("one"), 120.0)
    ended = await store.close("batch_1", Status.EXPIRED, 200.0)
    assert (ended.status, ended.completed, ended.failed, ended.pending) == (Status.EXPIRED, 1, 2, 0)
    assert await output(store) == [b"one\n"]
    errors = await output(store, done=False)
    assert [b"c-2" in errors[0], b"c-3" in errors[1]] == [True, True]
    assert all(b'"code":"batch_expired"' in line for line in errors)
    assert await store.finish(two, done("late"), 201.0) is None
    assert (await store.file("team", "file-err-batch_1")).bytes == sum(map(len, errors))
    assert (await store.file("team", "file-out-batch_1")).expires_at == 3800


async def test_deleted_results_are_gone(store):
    await started(store, 2)
    one, two = await store.claim("batch_1", 2, 500.0)
    await store.finish(one, done("one"), 120.0)
    await store.finish(two, failed("two"), 120.0)
    await store.close("batch_1", Status.COMPLETED, 130.0)
    assert await store.remove_file("team", "file-out-batch_1")
    assert await output(store) == []
    assert await output(store, done=False) == [b"two\n"]
    assert (await store.batch("team", "batch_1")).completed == 1


# ── time ──


async def test_a_claim_that_is_not_renewed_is_given_up_and_one_that_is_goes_on(store):
    await started(store, 2)
    one, two = await store.claim("batch_1", 2, 150.0)
    await store.renew([two], 200.0)
    assert (await store.sweep(150.0, keep_seconds=KEEP)).claims == 1
    assert await store.finish(one, done(), 151.0) is None
    assert await store.finish(two, done(), 151.0) == 1
    assert [(item.line, item.attempt) for item in await store.claim("batch_1", 9, 500.0)] == [(1, 2)]


async def test_what_has_expired_or_ended_long_ago_is_removed(store):
    await store.add_file(upload(expires_at=1000))
    await started(store, 1, output_seconds=3600)
    await store.finish((await store.claim("batch_1", 1, 500.0))[0], done(), 120.0)
    await store.close("batch_1", Status.COMPLETED, 130.0)
    swept = await store.sweep(1000.0, keep_seconds=KEEP)
    assert (swept.files, swept.batches) == (1, 0)
    assert await store.file("team", "file-1") is None
    assert (await store.sweep(3730.0, keep_seconds=KEEP)).files == 1
    assert await output(store) == []
    assert (await store.sweep(130 + KEEP, keep_seconds=KEEP)).batches == 1
    assert await store.batch("team", "batch_1") is None


# ── the file on the disk ──


async def test_all_of_it_outlives_the_process_and_its_claims_do_not(tmp_path):
    async with sqlite(tmp_path) as store:
        await store.add_file(upload())
        await started(store, 3)
        one, two = await store.claim("batch_1", 2, 1e12)
        await store.finish(one, done("one"), 120.0)
        before = await store.batch("team", "batch_1")
    async with sqlite(tmp_path) as store:
        assert await store.batch("team", "batch_1") == before
        assert await store.file("team", "file-1") == upload()
        assert await output(store) == [b"one\n"]
        assert await store.finish(two, done(), 130.0) is None
        assert [(item.line, item.attempt) for item in await store.claim("batch_1", 9, 500.0)] == [(2, 2), (3, 1)]


async def test_a_second_process_is_told_that_the_state_is_anothers(tmp_path):
    async with sqlite(tmp_path):
        with pytest.raises(StateOff, match=r"another gateway keeps its state there; .* state\.path"):
            await asyncio.to_thread(SqliteStore.opened, tmp_path)
    async with sqlite(tmp_path) as store:
        assert await store.open_batches() == []


async def test_nobody_else_may_read_the_state(tmp_path):
    path = tmp_path / "made" / "anew"
    async with sqlite(path) as store:
        await started(store, 1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        for file in path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


async def test_state_that_cannot_be_kept_is_told_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateOff, match="Not a directory"):
        await asyncio.to_thread(SqliteStore.opened, tmp_path / "file" / "below")
    (tmp_path / FILE).write_bytes(b"this is no database" * 100)
    with pytest.raises(StateOff, match="not a database"):
        await asyncio.to_thread(SqliteStore.opened, tmp_path)


async def test_state_of_a_later_version_is_left_alone(tmp_path):
    async with sqlite(tmp_path):
        pass
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StateOff, match="later version"):
        await asyncio.to_thread(SqliteStore.opened, tmp_path)


async def test_a_database_held_by_another_program_is_waited_for(tmp_path):
    async with sqlite(tmp_path) as store:
        await started(store, 1)
        held, let_go = threading.Event(), threading.Event()

        def hold():
            db = sqlite3.connect(tmp_path / FILE, isolation_level=None)
            db.execute("BEGIN IMMEDIATE")
            held.set()
            let_go.wait()
            db.execute("COMMIT")
            db.close()

        holder = asyncio.create_task(asyncio.to_thread(hold))
        await asyncio.to_thread(held.wait)
        claiming = asyncio.create_task(store.claim("batch_1", 1, 500.0))
        assert await store.batch("team", "batch_1") is not None  # reading goes on
        assert not claiming.done()
        let_go.set()
        assert len(await claiming) == 1
        await holder


async def test_where_there_is_no_room_nothing_changes_and_all_goes_on_when_there_is(tmp_path):
    async with sqlite(tmp_path) as store:
        await started(store, 2)
        one, two = await store.claim("batch_1", 2, 500.0)
        await store._writer.do(lambda db: db.execute("PRAGMA max_page_count = 1").fetchone())
        large = done("x" * 1_000_000)
        small = store.finish(two, done("two"), 120.0)
        with pytest.raises(StateUnavailable, match="no room"):
            await asyncio.gather(store.finish(one, large, 120.0), small)
        await store._writer.do(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
        assert await store.finish(one, large, 121.0) == 0
        assert await output(store) == [large.line, b"two\n"]


# ── every history ──


@settings(max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
class Histories(RuleBasedStateMachine):
    """One batch of six items over both stores at once, in any order of verbs, with crashes between them.

    What has been acknowledged is written down here, and must be what both stores say.
    """

    LINES = 6

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name)
        self.loop = asyncio.new_event_loop()
        self.now = 110.0
        self.memory, self.sqlite = MemoryStore(), SqliteStore.opened(self.path)
        self.ended = {}  # line -> its result, as acknowledged
        self.claims = []  # of all times
        for store in self.stores:
            self.run(started(store, self.LINES))

    @property
    def stores(self):
        return self.memory, self.sqlite

    def run(self, work):
        return self.loop.run_until_complete(work)

    def both(self, verb, *args, **named):
        """Ask both; they say the same."""
        answers = []
        for store in self.stores:
            try:
                answers.append(self.run(getattr(store, verb)(*args, **named)))
            except NotPossible as error:
                answers.append(str(error))
        assert answers[0] == answers[1], verb
        return answers[0]

    @rule(most=st.integers(1, 4), seconds=st.integers(1, 20))
    def claim(self, most, seconds):
        claimed = self.both("claim", "batch_1", most, self.now + seconds)
        assert not {item.line for item in claimed} & self.ended.keys()
        self.claims += claimed

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), is_done=st.booleans())
    def finish(self, data, is_done):
        item = data.draw(st.sampled_from(self.claims))
        result = Result(is_done, f"{item.line}/{item.attempt}\n".encode(), Usage(1, 2))
        if self.both("finish", item, result, self.now) is not None:
            assert item.line not in self.ended
            self.ended[item.line] = result

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data):
        self.both("release", data.draw(st.lists(st.sampled_from(self.claims), max_size=3)))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def renew(self, data):
        self.both("renew", data.draw(st.lists(st.sampled_from(self.claims), max_size=3)), self.now + 10)

    @rule(seconds=st.integers(0, 15))
    def sweep(self, seconds):
        self.now += seconds
        self.both("sweep", self.now, keep_seconds=KEEP)

    @rule(status=st.sampled_from([Status.CANCELLING, Status.IN_PROGRESS, Status.FINALIZING]))
    def move(self, status):
        if status is not Status.FINALIZING or len(self.ended) == self.LINES:
            self.both("move", "batch_1", status, self.now)

    @rule(status=st.sampled_from([Status.COMPLETED, Status.CANCELLED, Status.EXPIRED]))
    def close(self, status):
        closed = self.both("close", "batch_1", status, self.now)
        if not isinstance(closed, str):
            for line in range(1, self.LINES + 1):
                self.ended.setdefault(line, Result(False, b""))

    @rule()
    def crash(self):
        """The process dies: SQLite's claims die with it, and so must the memory's."""
        self.run(self.sqlite.aclose())
        self.sqlite = SqliteStore.opened(self.path)
        self.run(self.memory.release(self.claims))

    @invariant()
    def nothing_is_lost_doubled_or_miscounted(self):
        told = self.both("batch", "team", "batch_1")
        kept = {True: self.both("lines", "batch_1", done=True, after=0, most_bytes=1 << 20)}
        kept[False] = self.both("lines", "batch_1", done=False, after=0, most_bytes=1 << 20)
        for is_done, count in ((True, told.completed), (False, told.failed)):
            lines = [line for line, _ in kept[is_done]]
            assert lines == sorted(line for line, result in self.ended.items() if result.is_done is is_done)
            assert count == len(lines)
            for line, text in kept[is_done]:
                assert self.ended[line].line in (text, b"")
        assert told.pending == self.LINES - len(self.ended) >= 0
        self.both("files", "team", Page())

    def teardown(self):
        self.run(self.sqlite.aclose())
        self.loop.close()
        self.directory.cleanup()


class TestHistories(Histories.TestCase):
    @pytest.fixture(autouse=True)
    def _hurried(self, monkeypatch):
        monkeypatch.setattr(sqlite_store, "GATHER_SECONDS", 0.0)


# ── whose end is to be told ──


async def test_that_an_end_is_to_be_told_lasts_until_somebody_has_been(store):
    await started(store, 1)
    await store.create(batch("batch_2"))
    assert await store.untold() == []
    await store.move("batch_2", Status.FAILED, 120.0)
    await store.move("batch_1", Status.CANCELLING, 130.0)
    await store.close("batch_1", Status.CANCELLED, 140.0)
    told = await store.untold()
    assert [(each.id, each.status) for each in told] == [("batch_1", Status.CANCELLED), ("batch_2", Status.FAILED)]
    await store.mark_told("batch_1")
    assert [each.id for each in await store.untold()] == ["batch_2"]
    await store.sweep(DAY * 365, keep_seconds=KEEP)
    assert await store.untold() == []


async def test_that_an_end_is_to_be_told_outlives_the_process(tmp_path):
    async with sqlite(tmp_path) as first:
        await first.create(batch())
        await first.move("batch_1", Status.FAILED, 120.0)
    async with sqlite(tmp_path) as second:
        assert [each.id for each in await second.untold()] == ["batch_1"]


# ── what others have run ──


async def test_results_that_were_made_elsewhere_end_their_items_once(store):
    await started(store, 4)
    (item,) = await store.claim("batch_1", 1, 200.0)
    await store.finish(item, done("mine"), 120.0)
    assert await store.unended("batch_1") == [(2, "c-2"), (3, "c-3"), (4, "c-4")]
    made = [(1, done("theirs")), (3, done("three", Usage(1, 2))), (2, failed())]
    assert await store.adopt("batch_1", made, 130.0) == 1
    assert await store.adopt("batch_1", [(3, failed())], 140.0) == 1
    assert await output(store) == [b"mine\n", b"three\n"]
    assert await output(store, done=False) == [b"bad\n"]
    kept = await store.batch("team", "batch_1")
    assert (kept.completed, kept.failed, kept.used, kept.status) == (2, 1, Usage(1, 2), Status.IN_PROGRESS)
    file = await store.file("team", kept.output_file_id)
    assert file.bytes == len(b"mine\nthree\n")
    assert await store.adopt("batch_1", [(4, done("four"))], 150.0) == 0
    assert (await store.batch("team", "batch_1")).status is Status.FINALIZING


async def test_a_note_changes_what_is_said_and_leaves_the_state(store):
    await started(store, 2)
    noted = await store.note("batch_1", handed=Handed("up", "file-there"))
    assert noted == await store.batch("team", "batch_1")
    assert (noted.status, noted.handed) == (Status.IN_PROGRESS, Handed("up", "file-there"))
    assert [each.id for each in await store.open_batches()] == ["batch_1"]


async def test_what_had_not_been_run_when_a_batch_ended_is_counted(store):
    await started(store, 3)
    (item,) = await store.claim("batch_1", 1, 200.0)
    await store.finish(item, failed(), 120.0)
    closed = await store.close("batch_1", Status.EXPIRED, 130.0)
    assert (closed.failed, closed.unrun) == (3, 2)


async def test_a_batch_that_is_removed_is_gone_with_its_results(store):
    await started(store, 1)
    (item,) = await store.claim("batch_1", 1, 200.0)
    await store.finish(item, done(), 120.0)
    closed = await store.close("batch_1", Status.COMPLETED, 130.0)
    await store.remove("batch_1")
    await store.remove("batch_1")
    assert await store.batch("team", "batch_1") is None
    assert await store.file("team", closed.output_file_id) is None
