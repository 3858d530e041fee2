//! Bounds, refusals, long readers, installs.

use super::super::DatabaseError;
use super::super::mark::AppliedMark;
use super::super::reader_pool::{Read, ReaderPool};
use super::super::replica::ApplyError;
use super::*;

fn leader_with_rows(folder: &Path, options: &ReplicaOptions, rows: i64) -> (Replica, Writer) {
    let leader = open(folder, "leader", options);
    let mut writer = leader.open_writer().unwrap();
    writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
    for row in 0..rows {
        writer.connection().execute("INSERT INTO t VALUES (?, zeroblob(1000))", [row]).unwrap();
    }
    seal_and_commit(&mut writer, &leader).unwrap();
    (leader, writer)
}

#[test]
fn each_pragma_that_would_break_replication_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, writer) = leader_with_rows(folder.path(), &options(4096), 1);
    let reader = leader.open_reader().unwrap();
    for connection in [writer.connection(), reader.connection()] {
        for sql in [
            "PRAGMA journal_mode = DELETE",
            "PRAGMA locking_mode = EXCLUSIVE",
            "PRAGMA page_size = 512",
            "PRAGMA synchronous = FULL",
            "PRAGMA wal_autocheckpoint = 1",
            "PRAGMA wal_checkpoint",
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "PRAGMA journal_size_limit = 1",
            "PRAGMA mmap_size = 0",
            "PRAGMA read_uncommitted = 1",
            "PRAGMA schema_version = 9",
            "PRAGMA writable_schema = 1",
            "PRAGMA encoding = 'UTF-16'",
            "PRAGMA cache_spill = 0",
            "PRAGMA fullfsync = 1",
            "PRAGMA checkpoint_fullfsync = 1",
            "PRAGMA hard_heap_limit = 1",
            "PRAGMA soft_heap_limit = 1",
            "PRAGMA temp_store_directory = '/'",
            "PRAGMA main.writable_schema = 1",
        ] {
            let error = connection.execute_batch(sql).unwrap_err().to_string();
            assert!(error.contains("is refused on a replicated database: "), "{sql}: {error}");
        }
        for sql in [
            "ATTACH 'other.db' AS o",
            "VACUUM INTO 'other.db'",
            "ATTACH 'raft-sqlite-view-1' AS o",
            "ATTACH 'other' || '.db' AS o",
            "ATTACH 'file:other.db' AS o",
            "SELECT load_extension('x')",
            "PRAGMA temp.writable_schema = 1",
            "PRAGMA temp.hard_heap_limit = 1",
        ] {
            assert!(connection.execute_batch(sql).is_err(), "{sql}");
        }
    }
    for number in 1..50 {
        // Not the names that connections have been opened by, however they are spelt.
        let attached = writer.connection().execute("ATTACH ? AS o", [format!("raft-sqlite-view-{number}")]);
        assert!(attached.is_err(), "{number}");
    }
    assert!(!Path::new("other.db").exists());
    // What is allowed, and replicates or stays with its connection.
    for sql in [
        "PRAGMA user_version = 3",
        "PRAGMA application_id = 4",
        "PRAGMA cache_size = 99",
        "ATTACH ':memory:' AS m; DETACH m",
        "PRAGMA optimize",
    ] {
        writer.connection().execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

#[test]
fn what_a_caller_leaves_on_the_connection_is_gone_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, mut writer) = leader_with_rows(folder.path(), &options(4096), 1);
    writer
        .connection()
        .execute_batch(
            "CREATE TEMP TABLE mine(x); INSERT INTO mine VALUES (1); PRAGMA foreign_keys = OFF; ATTACH ':memory:' AS m",
        )
        .unwrap();
    // Captured, not yet committed: survives the connection being opened anew.
    writer.connection().execute("INSERT INTO t VALUES (77, NULL)", []).unwrap();
    assert!(writer.reset_connection().unwrap());
    assert!(writer.connection().execute_batch("SELECT * FROM mine").is_err());
    assert!(writer.connection().execute_batch("CREATE TABLE m.x(y)").is_err());
    let foreign_keys: i64 = writer.connection().query_row("PRAGMA foreign_keys", [], |row| row.get(0)).unwrap();
    assert_eq!(foreign_keys, 1);
    let there: i64 =
        writer.connection().query_row("SELECT count(*) FROM t WHERE k = 77", [], |row| row.get(0)).unwrap();
    assert_eq!(there, 1);
    assert!(!writer.reset_connection().unwrap(), "nothing was touched since");
    seal_and_commit(&mut writer, &leader).unwrap();
    assert!(leader.verify().unwrap());
}

#[test]
fn an_oversized_transaction_is_rolled_back_and_the_writer_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let options = ReplicaOptions { max_transaction_bytes: 100 * 4096, ..options(4096) };
    let (leader, mut writer) = leader_with_rows(folder.path(), &options, 10);
    let fill = "WITH RECURSIVE c(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM c WHERE i < 3000) INSERT INTO t SELECT i, zeroblob(1000) FROM c";
    writer.connection().execute_batch("BEGIN IMMEDIATE").unwrap();
    let result = writer.connection().execute_batch(fill).and_then(|()| writer.connection().execute_batch("COMMIT"));
    assert!(result.is_err());
    assert_eq!(writer.take_too_large(), Some(100 * 4096));
    if !writer.connection().is_autocommit() {
        writer.connection().execute_batch("ROLLBACK").unwrap();
    }
    assert!(writer.seal().unwrap().is_none(), "nothing of it was captured");
    writer.connection().execute("INSERT INTO t VALUES (500, NULL)", []).unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    let count: i64 = writer.connection().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 11);
    assert!(leader.verify().unwrap());
}

#[test]
fn a_long_reader_sees_its_version_over_checkpoints_and_costs_only_what_it_pins() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, mut writer) = leader_with_rows(folder.path(), &options(4096), 500);
    leader.checkpoint(leader.pin(), position(1)).unwrap();
    assert!(leader.statistics().memory_bytes < 10 * 4096, "checkpointed pages leave memory");
    let old_pages = leader.statistics().page_count as usize;
    let reader = leader.open_reader().unwrap();
    let pinned = reader.begin().unwrap();
    let before = dump(reader.connection());
    for round in 0..20i64 {
        writer.connection().execute("UPDATE t SET v = zeroblob(900 + ?)", [round]).unwrap();
        writer.connection().execute("DELETE FROM t WHERE k = ?", [round]).unwrap();
        if round == 10 {
            writer.connection().execute_batch("DELETE FROM t WHERE k > 250; VACUUM").unwrap();
        }
        seal_and_commit(&mut writer, &leader).unwrap();
        leader.checkpoint(leader.pin(), position(round as u64 + 2)).unwrap();
        assert_eq!(dump(reader.connection()), before, "round {round}");
    }
    // The old state once: what came after it is in the file.
    let statistics = leader.statistics();
    let (memory, held) = (statistics.memory_bytes, statistics.held_bytes);
    let once = old_pages * (4096 + 512);
    assert!(
        memory < once + 20 * 4096 && held < once && held > once / 2,
        "{memory} bytes, {held} are held, {once} once"
    );
    assert!(reader.begin().is_err(), "it is in a transaction still");
    assert!(pinned < leader.committed());
    reader.end().unwrap();
    writer.connection().execute_batch("DELETE FROM t WHERE k = 100").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    leader.checkpoint(leader.pin(), position(30)).unwrap();
    assert!(leader.statistics().memory_bytes < 20 * 4096, "{}", leader.statistics().memory_bytes);
    assert!(leader.verify().unwrap());
}

#[test]
fn pages_that_were_cut_off_leave_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, mut writer) = leader_with_rows(folder.path(), &options(4096), 5);
    // Changed and cut off between two checkpoints: they are never written.
    writer.connection().execute_batch("UPDATE t SET v = zeroblob(400000)").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    let grown = leader.statistics().memory_bytes;
    writer.connection().execute_batch("DELETE FROM t; VACUUM").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    let reader = leader.open_reader().unwrap();
    reader.begin().unwrap();
    leader.checkpoint(leader.pin(), position(2)).unwrap();
    let memory = leader.statistics().memory_bytes;
    assert!(grown > 480 * 4096 && memory < 10 * 4096, "{grown}, then {memory} bytes");
    writer.connection().execute_batch("INSERT INTO t VALUES (1, zeroblob(900000))").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    leader.checkpoint(leader.pin(), position(3)).unwrap();
    let rows: i64 = reader.connection().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
    assert!(leader.verify().unwrap());
}

#[test]
fn readers_keep_no_more_memory_than_they_may_and_the_oldest_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let max_reader_bytes = 600_000;
    let (leader, mut writer) =
        leader_with_rows(folder.path(), &ReplicaOptions { max_reader_bytes, ..options(4096) }, 300);
    leader.checkpoint(leader.pin(), position(1)).unwrap();
    let begin = || {
        let reader = leader.open_reader().unwrap();
        reader.connection().execute_batch("PRAGMA cache_size = 5").unwrap();
        reader.begin().unwrap();
        reader
    };
    let sum = |reader: &crate::database::Reader| -> rusqlite::Result<i64> {
        reader.connection().query_row("SELECT sum(length(v)) FROM t", [], |row| row.get(0))
    };
    let mut update = |value: u32| {
        writer.connection().execute("UPDATE t SET v = zeroblob(?)", [value]).unwrap();
        seal_and_commit(&mut writer, &leader).unwrap();
        leader.checkpoint(leader.pin(), position(u64::from(value))).unwrap();
    };
    let mut readers = Vec::new();
    for round in 0..10 {
        // Each version is about 350 KB.
        readers.push((begin(), if round == 0 { 1000 } else { 900 + round - 1 }));
        update(900 + round);
        let held = leader.statistics().held_bytes;
        assert!(held < max_reader_bytes, "round {round}: {held} bytes are held");
    }
    let (last, others) = readers.split_last().unwrap();
    // The newest is as it was; all others were told why, and may begin again.
    assert_eq!(sum(&last.0).unwrap(), i64::from(last.1) * 300);
    for (reader, _) in others {
        assert!(sum(reader).is_err());
        match reader.end() {
            Err(error @ DatabaseError::ReaderHoldsTooMuch { max_bytes: 600_000 }) => {
                assert!(error.to_string().contains("max_reader_bytes"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        reader.begin().unwrap();
        assert_eq!(sum(reader).unwrap(), 909 * 300);
        reader.end().unwrap();
    }
    drop(readers);
    update(1);
    assert_eq!(leader.statistics().held_bytes, 0);
}

#[test]
fn a_reader_that_is_too_old_gets_an_error_instead_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let options = ReplicaOptions { max_reader_age: std::time::Duration::ZERO, ..options(4096) };
    let (leader, mut writer) = leader_with_rows(folder.path(), &options, 300);
    let reader = leader.open_reader().unwrap();
    reader.connection().execute_batch("PRAGMA cache_size = 5").unwrap();
    reader.begin().unwrap();
    let began = std::time::Instant::now();
    while began.elapsed().is_zero() {
        std::thread::yield_now();
    }
    writer.connection().execute_batch("UPDATE t SET v = zeroblob(900)").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    let read: rusqlite::Result<i64> =
        reader.connection().query_row("SELECT sum(length(v)) FROM t", [], |row| row.get(0));
    assert!(read.is_err());
    assert!(matches!(reader.end(), Err(DatabaseError::ReaderTooOld { .. })));
    reader.begin().unwrap();
    reader.end().unwrap();
}

#[test]
fn a_caller_of_the_pool_is_told_that_its_read_lasted_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let options = ReplicaOptions { max_reader_age: std::time::Duration::ZERO, ..options(4096) };
    let (leader, writer) = leader_with_rows(folder.path(), &options, 300);
    let pool = ReaderPool::start(1).unwrap();
    let ask = |overtaking: Option<(Replica, crate::database::Writer)>| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let read: Read = Box::new(move |opened| {
            let (connection, _) = opened.unwrap();
            connection.execute_batch("PRAGMA cache_size = 5").unwrap();
            let began = std::time::Instant::now();
            while began.elapsed().is_zero() {
                std::thread::yield_now();
            }
            if let Some((leader, mut writer)) = overtaking {
                writer.connection().execute_batch("UPDATE t SET v = zeroblob(900)").unwrap();
                seal_and_commit(&mut writer, &leader).unwrap();
            }
            let read = connection.query_row("SELECT sum(length(v)) FROM t", [], |row| row.get::<_, i64>(0));
            Box::new(move |ended| sender.send((read.is_ok(), ended)).unwrap())
        });
        assert!(pool.submit(leader.clone(), read, crate::database::ticket::Ticket::new(None)));
        receiver.recv().unwrap()
    };
    let (read, ended) = ask(Some((leader.clone(), writer)));
    assert!(!read && matches!(ended, Err(DatabaseError::ReaderTooOld { .. })), "{ended:?}");
    let (read, ended) = ask(None);
    assert!(read && ended.is_ok(), "{ended:?}");
    pool.stop();
}

#[test]
fn a_reader_that_a_caller_left_something_on_is_not_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, _writer) = leader_with_rows(folder.path(), &options(4096), 3);
    for sql in [
        "CREATE TEMP TABLE mine(x)",
        "ATTACH ':memory:' AS m",
        "PRAGMA case_sensitive_like = 1",
        "PRAGMA query_only(1)",
        "CREATE TEMP VIEW w AS SELECT 1",
    ] {
        let reader = leader.open_reader().unwrap();
        reader.begin().unwrap();
        reader.connection().query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).unwrap();
        reader.end().unwrap();
        assert!(reader.is_current());
        reader.connection().execute_batch(sql).unwrap();
        assert!(!reader.is_current(), "{sql}");
    }
}

#[test]
fn an_empty_database_takes_over_the_page_size_of_its_leader() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, mut writer) = leader_with_rows(folder.path(), &options(4096), 3);
    writer.connection().execute("INSERT INTO t VALUES (100, NULL)", []).unwrap();
    let second = seal_and_commit(&mut writer, &leader).unwrap();
    let other = tempfile::tempdir().unwrap();
    let (same, mut same_writer) = (open(other.path(), "leader", &options(4096)), Vec::new());
    {
        let mut writer = same.open_writer().unwrap();
        writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
        for row in 0..3 {
            writer.connection().execute("INSERT INTO t VALUES (?, zeroblob(1000))", [row]).unwrap();
        }
        same_writer.push(seal_and_commit(&mut writer, &same).unwrap());
    }
    for checkpointed in [false, true] {
        let follower = open(folder.path(), &format!("follower-{checkpointed}"), &options(1024));
        if checkpointed {
            follower.checkpoint(follower.pin(), position(1)).unwrap();
        }
        let reader = follower.open_reader().unwrap();
        follower.apply(&same_writer[0]).unwrap();
        assert!(!reader.is_current());
        follower.apply(&second).unwrap();
        assert_same_pages(&leader, &follower);
        follower.checkpoint(follower.pin(), position(3)).unwrap();
        drop((reader, follower));
        let follower = open(folder.path(), &format!("follower-{checkpointed}"), &options(1024));
        assert_same_pages(&leader, &follower);
        assert_integrity(follower.open_reader().unwrap().connection());
    }
}

#[test]
fn a_page_set_on_another_base_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(4096);
    let (leader, mut writer) = leader_with_rows(folder.path(), &options, 3);
    let follower = open(folder.path(), "follower", &options);
    writer.connection().execute("INSERT INTO t VALUES (100, NULL)", []).unwrap();
    let second = seal_and_commit(&mut writer, &leader).unwrap();
    let hash = follower.pin().state_hash();
    assert!(matches!(follower.apply(&second), Err(ApplyError::BaseMismatch { .. })));
    assert_eq!(follower.pin().state_hash(), hash);
    // This node's own writer is open: a foreign entry has to wait until it is closed.
    writer.connection().execute("INSERT INTO t VALUES (101, NULL)", []).unwrap();
    let third = writer.seal().unwrap().unwrap();
    assert!(matches!(leader.apply(&third.page_set), Err(ApplyError::CapturedVersionsExist)));
    writer.discard();
    leader.apply(&third.page_set).unwrap();
    assert!(leader.verify().unwrap());
}

#[test]
fn an_install_replaces_the_state_and_open_readers_keep_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(4096);
    let (leader, mut writer) = leader_with_rows(folder.path(), &options, 50);
    let follower = open(folder.path(), "follower", &options);
    let old_reader = follower.open_reader().unwrap();
    old_reader.begin().unwrap();
    leader.checkpoint(leader.pin(), position(9)).unwrap();
    let pin = leader.pin();
    let mark = AppliedMark { position: position(9), version: pin.version(), state_hash: pin.state_hash() };
    let received = folder.path().join("received");
    std::fs::copy(folder.path().join("leader.sqlite"), &received).unwrap();

    let mut wrong = std::fs::read(&received).unwrap();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    let damaged = folder.path().join("damaged");
    std::fs::write(&damaged, wrong).unwrap();
    assert!(matches!(follower.install(&damaged, mark), Err(DatabaseError::Damaged { .. })));
    assert_eq!(follower.committed(), crate::page::Version(0), "the old state stands");

    follower.install(&received, mark).unwrap();
    assert_same_pages(&leader, &follower);
    let tables = |reader: &super::super::Reader| -> i64 {
        reader.connection().query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(tables(&old_reader), 0);
    assert!(!old_reader.is_current());
    assert_eq!(tables(&follower.open_reader().unwrap()), 1);
    writer.connection().execute("INSERT INTO t VALUES (1000, NULL)", []).unwrap();
    follower.apply(&seal_and_commit(&mut writer, &leader).unwrap()).unwrap();
    assert_same_pages(&leader, &follower);
    drop(follower);
    let (follower, read) = Replica::open(folder.path(), "follower", options).unwrap();
    assert_eq!(read.unwrap(), mark);
    assert!(follower.verify().unwrap());
}

#[test]
fn a_second_writer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (leader, writer) = leader_with_rows(folder.path(), &options(4096), 1);
    assert!(matches!(leader.open_writer(), Err(DatabaseError::Closed)));
    drop(writer);
    leader.open_writer().unwrap();
}
