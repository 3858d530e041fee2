//! Plain SQLite through rusqlite: one connection that writes, one for each caller that reads, WAL.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use raft_sqlite::rusqlite::{self, Connection};

use crate::load::{self, Measure, Meter, Outcome, PRELOADED, ROWS, Tally, WRITERS, Workload};

const INSERT: &str = "INSERT INTO item(value) VALUES (?)";
const SELECT: &str = "SELECT length(value) FROM item WHERE id = ?";

fn open(path: &Path, synchronous: &str) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.execute_batch(&format!("PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous};"))?;
    Ok(connection)
}

pub fn measure(measure: &Measure, synchronous: &str) -> Result<Outcome> {
    std::fs::create_dir_all(&measure.data)?;
    let path = measure.data.join("bench.sqlite");
    let writer = open(&path, synchronous)?;
    writer.execute_batch("CREATE TABLE item(id INTEGER PRIMARY KEY, value BLOB NOT NULL)")?;
    if measure.workload.reads() {
        for first in (0..PRELOADED).step_by(ROWS as usize) {
            insert_rows(&writer, first)?;
        }
    }
    let writer = Mutex::new(writer);
    let number = AtomicU64::new(0);
    let next = || number.fetch_add(1, Ordering::Relaxed);
    let end = Instant::now() + Duration::from_secs(measure.seconds);
    let insert = || insert_one(&writer.lock().expect("no caller panics"), next());
    let meter = Meter::start();
    let tallies = std::thread::scope(|scope| {
        let writers = if measure.workload == Workload::SelectWhileWriting { WRITERS } else { 0 };
        for _ in 0..writers {
            scope.spawn(|| {
                while Instant::now() < end {
                    let _ = insert();
                }
            });
        }
        let callers: Vec<_> = (0..measure.callers)
            .map(|_| {
                scope.spawn(|| -> rusqlite::Result<Tally> {
                    let mut tally = Tally::default();
                    let reader = open(&path, synchronous)?;
                    while Instant::now() < end {
                        let began = Instant::now();
                        match measure.workload {
                            Workload::Insert => tally.count(began, 1, insert()),
                            Workload::Rows => {
                                let connection = writer.lock().expect("no caller panics");
                                tally.count(began, ROWS, insert_rows(&connection, next() * ROWS));
                            }
                            _ => tally.count(began, 1, select(&reader, next())),
                        }
                    }
                    Ok(tally)
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().expect("no caller panics")).collect::<rusqlite::Result<Vec<_>>>()
    })?;
    Ok(meter.finish(tallies))
}

fn insert_one(connection: &Connection, number: u64) -> rusqlite::Result<()> {
    connection.prepare_cached(INSERT)?.execute([load::value(number)]).map(drop)
}

fn insert_rows(connection: &Connection, first: u64) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    let mut insert = connection.prepare_cached(INSERT)?;
    (first..first + ROWS).try_for_each(|number| insert.execute([load::value(number)]).map(drop))?;
    connection.execute_batch("COMMIT")
}

fn select(connection: &Connection, number: u64) -> rusqlite::Result<()> {
    connection.prepare_cached(SELECT)?.query_row([load::some_key(number)], |row| row.get::<_, i64>(0)).map(drop)
}
