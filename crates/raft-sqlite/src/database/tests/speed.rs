//! Figures, not checks: `cargo test --release -p raft-sqlite --lib -- --ignored --nocapture speed`.
//! No Raft and no disk: capture, sealing and applying alone, 256-byte values over 100,000 preloaded rows.

use std::time::{Duration, Instant};

use rusqlite::{Connection, params};

use super::*;

const PRELOADED: i64 = 100_000;
const DURATION: Duration = Duration::from_millis(1500);

#[derive(Clone, Copy, Debug)]
enum Keys {
    Sequential,
    RandomInteger,
    RandomText,
}

fn schema(keys: Keys) -> &'static str {
    match keys {
        Keys::RandomText => "CREATE TABLE kv(k TEXT PRIMARY KEY, v BLOB) WITHOUT ROWID",
        _ => "CREATE TABLE kv(k INTEGER PRIMARY KEY, v BLOB)",
    }
}

fn insert(connection: &Connection, keys: Keys, row: i64, random: &mut Random, value: &[u8]) {
    let mut statement = connection.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?, ?)").unwrap();
    match keys {
        Keys::Sequential => statement.execute(params![row, value]),
        Keys::RandomInteger => statement.execute(params![random.below(PRELOADED as u64) as i64, value]),
        Keys::RandomText => statement.execute(params![format!("/registry/pods/{:012x}", random.next() >> 16), value]),
    }
    .unwrap();
}

/// Half random, half text: not trivially compressible.
fn value(random: &mut Random) -> Vec<u8> {
    let mut value = random.blob(128);
    while value.len() < 256 {
        value.extend_from_slice(format!("\"name\":\"pod-{:x}\",", random.next() >> 40).as_bytes());
    }
    value.truncate(256);
    value
}

fn preload(connection: &Connection, keys: Keys, random: &mut Random) {
    connection.execute_batch(schema(keys)).unwrap();
    connection.execute_batch("BEGIN").unwrap();
    for row in 0..PRELOADED {
        let value = value(random);
        insert(connection, keys, row, random, &value);
    }
    connection.execute_batch("COMMIT").unwrap();
}

fn per_second(count: u64, elapsed: Duration) -> u64 {
    (count as f64 / elapsed.as_secs_f64()) as u64
}

#[test]
#[ignore = "prints figures; run it in release"]
fn speed_of_capture_and_apply() {
    for keys in [Keys::Sequential, Keys::RandomInteger, Keys::RandomText] {
        for group in [1u64, 64] {
            let folder = tempfile::tempdir().unwrap();
            let options = ReplicaOptions { max_transaction_bytes: 512 << 20, ..options(4096) };
            let leader = open(folder.path(), "leader", &options);
            let mut writer = leader.open_writer().unwrap();
            let mut random = Random::new(99);
            preload(writer.connection(), keys, &mut random);
            let mut log = vec![seal_and_commit(&mut writer, &leader).unwrap()];
            leader.checkpoint(leader.pin(), position(1)).unwrap();
            let values: Vec<Vec<u8>> = (0..256).map(|_| value(&mut random)).collect();
            let (mut transactions, mut bytes, mut row) = (0, 0, 10 * PRELOADED);
            let (start, mut sql) = (Instant::now(), Duration::ZERO);
            while start.elapsed() < DURATION {
                let began = Instant::now();
                for _ in 0..group {
                    insert(writer.connection(), keys, row, &mut random, &values[row as usize & 255]);
                    row += 1;
                }
                sql += began.elapsed();
                transactions += group;
                let page_set = seal_and_commit(&mut writer, &leader).unwrap();
                bytes += page_set.len() as u64;
                log.push(page_set);
            }
            let elapsed = start.elapsed();
            let follower = open(folder.path(), "follower", &options);
            follower.apply(&log[0]).unwrap();
            let start = Instant::now();
            for page_set in &log[1..] {
                follower.apply(page_set).unwrap();
            }
            let applied = start.elapsed();
            println!(
                "{keys:?}, {group} a group: {} transactions/s ({} in SQL alone), {} bytes a transaction; applied at {} transactions/s",
                per_second(transactions, elapsed),
                per_second(transactions, sql),
                bytes / transactions,
                per_second(transactions, applied),
            );
            assert_eq!(leader.pin().state_hash(), follower.pin().state_hash());
        }
    }
}

#[test]
#[ignore = "prints figures; run it in release"]
fn speed_of_reads() {
    let folder = tempfile::tempdir().unwrap();
    let options = ReplicaOptions { max_transaction_bytes: 512 << 20, ..options(4096) };
    let leader = open(folder.path(), "leader", &options);
    let mut writer = leader.open_writer().unwrap();
    let mut random = Random::new(99);
    preload(writer.connection(), Keys::Sequential, &mut random);
    seal_and_commit(&mut writer, &leader).unwrap();
    for place in ["in memory", "in the file"] {
        if place == "in the file" {
            leader.checkpoint(leader.pin(), position(1)).unwrap();
        }
        let reader = leader.open_reader().unwrap();
        let (start, mut reads) = (Instant::now(), 0u64);
        while start.elapsed() < DURATION {
            reader.begin().unwrap();
            let mut statement = reader.connection().prepare_cached("SELECT v FROM kv WHERE k = ?").unwrap();
            for _ in 0..16 {
                let key = random.below(PRELOADED as u64) as i64;
                let length: usize = statement.query_row([key], |row| Ok(row.get_ref(0)?.as_blob()?.len())).unwrap();
                assert_eq!(length, 256);
                reads += 1;
            }
            drop(statement);
            reader.end().unwrap();
        }
        println!("{place}: {} point reads/s, 16 a transaction", per_second(reads, start.elapsed()));
        let (start, mut scans) = (Instant::now(), 0u64);
        while start.elapsed() < DURATION {
            reader.begin().unwrap();
            let total = "SELECT sum(length(v)) FROM kv";
            let bytes: i64 = reader.connection().query_row(total, [], |row| row.get(0)).unwrap();
            assert_eq!(bytes, 256 * PRELOADED);
            reader.end().unwrap();
            scans += 1;
        }
        let pages = scans * u64::from(leader.pin().page_count());
        println!("{place}: {} pages/s in full scans", per_second(pages, start.elapsed()));
    }
}
