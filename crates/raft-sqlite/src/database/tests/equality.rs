//! Random SQL on a leader, replicated to a follower, and on a plain SQLite: all three hold the same, at every step.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use super::super::Writer;
use super::super::replica::PinnedVersion;
use super::random_sql::{self, Outcome, Refused, SavePoints, Schema, Step};
use super::*;

type Sql = Vec<(String, Vec<Value>)>;

const SETUP: &str = "
    CREATE TABLE kv(k INTEGER PRIMARY KEY, v BLOB, n INT); CREATE INDEX kvn ON kv(n);
    CREATE TABLE big(k INTEGER PRIMARY KEY, v BLOB);
    CREATE TABLE name(t TEXT PRIMARY KEY, n INT) WITHOUT ROWID;
    CREATE TABLE gen(a INT, b INT AS (a * 2) STORED, c TEXT);
    CREATE VIRTUAL TABLE ft USING fts5(body);
    CREATE TABLE audit(k INT, at INT);
    CREATE TRIGGER kv_audit AFTER UPDATE ON kv BEGIN INSERT INTO audit VALUES (new.k, new.n); END;
    CREATE TABLE meta(seq INT); INSERT INTO meta VALUES (0);
    CREATE TABLE acct(id INTEGER PRIMARY KEY, b INT);
    WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 100) INSERT INTO acct SELECT i, 1000 FROM c;";

fn one(sql: &str, values: Vec<Value>) -> (String, Vec<Value>) {
    (sql.to_owned(), values)
}

/// One transaction.
fn transaction(random: &mut Random, seq: i64) -> Sql {
    let mut sql = vec![one("BEGIN IMMEDIATE", vec![]), one("UPDATE meta SET seq = ?", vec![seq.into()])];
    for step in 0..random.below(5) {
        let key = random.below(500) as i64;
        match random.below(22) {
            0..=6 => {
                let length = random.below(300);
                sql.push(one(
                    "INSERT OR REPLACE INTO kv VALUES (?, ?, ?)",
                    vec![key.into(), random.blob(length).into(), (seq % 50).into()],
                ));
            }
            7..=8 => sql.push(one("DELETE FROM kv WHERE k BETWEEN ? AND ?", vec![key.into(), (key + 20).into()])),
            9..=10 => sql.push(one("UPDATE kv SET n = n + 1 WHERE k % 7 = ?", vec![(key % 7).into()])),
            11 => {
                let length = random.below(60_000);
                sql.push(one(
                    "INSERT OR REPLACE INTO big VALUES (?, ?)",
                    vec![(key % 10).into(), random.blob(length).into()],
                ));
            }
            12 => sql.push(one("DELETE FROM big WHERE k < ?", vec![(key % 10).into()])),
            13..=14 => {
                sql.push(one("INSERT OR REPLACE INTO name VALUES ('name-' || ?, ?)", vec![key.into(), seq.into()]))
            }
            15 => sql.push(one("INSERT INTO gen(a, c) VALUES (?, json_object('k', ?))", vec![key.into(), seq.into()])),
            16 => sql.push(one(
                "INSERT INTO ft VALUES ('word' || ? || ' and word' || ?)",
                vec![(key % 30).into(), (seq % 30).into()],
            )),
            17 => sql.push(one(&format!("CREATE TABLE IF NOT EXISTS extra{}(x)", key % 5), vec![])),
            18 => sql.push(one(&format!("DROP TABLE IF EXISTS extra{}", key % 5), vec![])),
            20 if random.below(3) == 0 => sql.push(one("PRAGMA incremental_vacuum(7)", vec![])),
            20 => sql.push(one(&format!("PRAGMA user_version = {seq}"), vec![])),
            19 if random.below(8) == 0 => {
                sql.push(one(&format!("ALTER TABLE gen ADD COLUMN c{seq}_{step} DEFAULT 7"), vec![]));
            }
            _ => {
                // A savepoint over enough pages to spill the cache, rolled back more often than not.
                sql.push(one("SAVEPOINT a", vec![]));
                sql.push(one(
                    "UPDATE kv SET v = zeroblob(400), n = ? WHERE k > ?",
                    vec![(seq % 50).into(), (key / 2).into()],
                ));
                sql.push(one(if random.below(3) == 0 { "RELEASE a" } else { "ROLLBACK TO a" }, vec![]));
            }
        }
    }
    let (from, to, amount) = (1 + random.below(100) as i64, 1 + random.below(100) as i64, random.below(100) as i64);
    sql.push(one("UPDATE acct SET b = b - ? WHERE id = ?", vec![amount.into(), from.into()]));
    sql.push(one("UPDATE acct SET b = b + ? WHERE id = ?", vec![amount.into(), to.into()]));
    sql.push(one(if random.below(10) == 0 { "ROLLBACK" } else { "COMMIT" }, vec![]));
    sql
}

fn run(connection: &Connection, sql: &Sql) {
    for (text, values) in sql {
        if text.starts_with("PRAGMA") {
            connection.execute_batch(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            continue;
        }
        let mut statement = connection.prepare_cached(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        statement.execute(params_from_iter(values)).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
}

/// A transaction of any SQL, made for the schema of the moment and run at once; and what each statement gave.
fn run_random(connection: &Connection, random: &mut Random, seq: i64) -> Any {
    let mut any = Any::default();
    let mut run = |step: Step| {
        any.outcomes.push(outcome(connection, &step));
        any.steps.push(step);
    };
    run("BEGIN IMMEDIATE".into());
    run(Step { sql: "UPDATE meta SET seq = ?1".into(), values: vec![seq.into()] });
    let mut savepoints = SavePoints::default();
    for _ in 0..random.below(12) {
        let schema = Schema::read(connection).unwrap();
        run(random_sql::statement(random, &schema, &mut savepoints));
        if connection.is_autocommit() {
            return any;
        }
    }
    run(if random.below(10) == 0 { "ROLLBACK" } else { "COMMIT" }.into());
    if !connection.is_autocommit() {
        // A deferred constraint does not hold.
        run("ROLLBACK".into());
    }
    any
}

/// Rowids that a connection remembers are its own affair.
fn outcome(connection: &Connection, step: &Step) -> Result<Outcome, Refused> {
    random_sql::run(connection, step).map(|outcome| Outcome { last_insert_rowid: 0, ..outcome })
}

#[derive(Default)]
struct Any {
    steps: Vec<Step>,
    outcomes: Vec<Result<Outcome, Refused>>,
}

/// A transaction as it ran on the leader.
enum Transaction {
    Known(Sql),
    Any(Any),
}

impl Transaction {
    fn run_again(&self, plain: &Connection) {
        match self {
            Transaction::Known(sql) => run(plain, sql),
            Transaction::Any(any) => {
                for (step, want) in any.steps.iter().zip(&any.outcomes) {
                    assert_eq!(outcome(plain, step), *want, "{step:?}");
                }
            }
        }
    }
}

/// Random queries, the pages' own tables among them, find the same.
fn assert_same_answers(random: &mut Random, connection: &Connection, plain: &Connection) {
    let schema = Schema::read(plain).unwrap();
    for _ in 0..8 {
        let query = random_sql::query(random, &schema);
        let rows = |connection: &Connection| {
            outcome(connection, &query).map(|outcome| {
                let mut lines: Vec<String> = outcome.rows.iter().map(|row| format!("{row:?}")).collect();
                lines.sort();
                lines
            })
        };
        assert_eq!(rows(connection), rows(plain), "{query:?}");
    }
}

/// Reads over and over: sums that every transaction keeps, and two ways to count that must agree.
fn reader(replica: Replica, low: Arc<AtomicI64>, high: Arc<AtomicI64>, stop: Arc<AtomicBool>) -> u64 {
    let reader = replica.open_reader().unwrap();
    let number = |sql: &str| -> i64 { reader.connection().query_row(sql, [], |row| row.get(0)).unwrap() };
    let mut reads = 0;
    let mut last = 0;
    while !stop.load(SeqCst) {
        let before = low.load(SeqCst);
        reader.begin().unwrap();
        let seq = number("SELECT seq FROM meta");
        let after = high.load(SeqCst);
        assert!(before <= seq && seq <= after, "a reader saw {seq}, committed were {before} to {after}");
        assert!(seq >= last, "a reader went back from {last} to {seq}");
        last = seq;
        assert_eq!(number("SELECT sum(b) FROM acct"), 100_000);
        assert_eq!(
            number("SELECT count(*) FROM kv"),
            number("SELECT count(*) FROM kv INDEXED BY kvn WHERE n IS NOT NULL")
        );
        let _: Option<i64> = reader
            .connection()
            .query_row("SELECT sum(length(v) + unicode(hex(substr(v, -1)))) FROM big", [], |row| row.get(0))
            .unwrap();
        assert_eq!(number("SELECT seq FROM meta"), seq, "a transaction saw two states");
        reader.end().unwrap();
        reads += 1;
    }
    reads
}

struct InFlight {
    transactions: Vec<Transaction>,
    version: crate::page::Version,
    page_set: bytes::Bytes,
    seq: i64,
}

/// `auto_vacuum`: 0 none, 1 full, 2 incremental.
fn verify(page_size: u32, cache_pages: i32, auto_vacuum: u32, steps: usize, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let options = options(page_size);
    let leader = open(folder.path(), "leader", &options);
    let follower = open(folder.path(), "follower", &options);
    let plain = Connection::open_in_memory().unwrap();
    plain.execute_batch(&format!("PRAGMA page_size = {page_size}; VACUUM")).unwrap();
    let open_writer = || -> Writer {
        let writer = leader.open_writer().unwrap();
        writer.connection().execute_batch(&format!("PRAGMA cache_size = {cache_pages}")).unwrap();
        writer
    };
    let mut writer = open_writer();
    let mut random = Random::new(seed);
    let (low, high) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));

    for connection in [writer.connection(), &plain] {
        // Our page 1 is there from the beginning: the mode changes with a VACUUM.
        connection.execute_batch(&format!("PRAGMA auto_vacuum = {auto_vacuum}; VACUUM")).unwrap();
        connection.execute_batch(&format!("BEGIN IMMEDIATE; {SETUP} COMMIT")).unwrap();
        let mode: u32 = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get(0)).unwrap();
        assert_eq!(mode, auto_vacuum);
    }
    let page_set = seal_and_commit(&mut writer, &leader).unwrap();
    follower.apply(&page_set).unwrap();
    let readers: Vec<_> = [&leader, &follower]
        .map(|replica| {
            let (replica, low, high, stop) = (replica.clone(), low.clone(), high.clone(), stop.clone());
            std::thread::spawn(move || reader(replica, low, high, stop))
        })
        .into();

    let mut pins: Vec<PinnedVersion> = Vec::new();
    let mut in_flight: VecDeque<InFlight> = VecDeque::new();
    let mut group: Vec<Transaction> = Vec::new();
    let (mut seq, mut index) = (0, 1);
    for step in 0..steps {
        seq += 1;
        let vacuum = random.below(100) == 0;
        if !vacuum && random.below(3) == 0 {
            group.push(Transaction::Any(run_random(writer.connection(), &mut random, seq)));
        } else {
            let sql = if vacuum { vec![one("VACUUM", vec![])] } else { transaction(&mut random, seq) };
            run(writer.connection(), &sql);
            group.push(Transaction::Known(sql));
        }
        // Groups of one to a few transactions, on their way for a while.
        if (random.below(3) == 0 || vacuum)
            && let Some(sealed) = writer.seal().unwrap()
        {
            in_flight.push_back(InFlight {
                transactions: std::mem::take(&mut group),
                version: sealed.version,
                page_set: sealed.page_set,
                seq,
            });
        }
        let settle = step % 100 == 99;
        if settle && let Some(sealed) = writer.seal().unwrap() {
            in_flight.push_back(InFlight {
                transactions: std::mem::take(&mut group),
                version: sealed.version,
                page_set: sealed.page_set,
                seq,
            });
        }
        let lag = if settle { 0 } else { random.below(6) as usize };
        while in_flight.len() > lag {
            let committed = in_flight.pop_front().unwrap();
            index += 1;
            high.store(committed.seq, SeqCst);
            leader.commit_captured(committed.version).unwrap();
            assert_eq!(follower.apply(&committed.page_set).unwrap(), committed.version);
            committed.transactions.iter().for_each(|transaction| transaction.run_again(&plain));
            if random.below(10) == 0 {
                leader.checkpoint(leader.pin(), position(index)).unwrap();
            }
            if random.below(15) == 0 {
                follower.checkpoint(follower.pin(), position(index)).unwrap();
            }
            // Some versions are held for a while, over commits, discards and checkpoints, and are still whole then.
            match random.below(12) {
                0 => pins.push(if random.below(2) == 0 { leader.pin() } else { follower.pin() }),
                1 if !pins.is_empty() => assert_whole(&pins.swap_remove(random.below(pins.len() as u64) as usize)),
                _ => {}
            }
            // The follower is behind the leader for an instant: a reader of either is at or after what both have.
            let seen: i64 = plain.query_row("SELECT seq FROM meta", [], |row| row.get(0)).unwrap();
            low.store(seen, SeqCst);
        }
        if !settle && random.below(30) == 0 {
            // The leadership is lost: what is captured never happened.
            writer.discard();
            in_flight.clear();
            group.clear();
            writer = open_writer();
            let reader = leader.open_reader().unwrap();
            let want = dump(&plain);
            assert_eq!(dump(writer.connection()), want, "the writer begins at the committed state");
            assert_eq!(dump(reader.connection()), want);
        }
        if settle {
            assert_same_pages(&leader, &follower);
            let want = dump(&plain);
            for replica in [&leader, &follower] {
                let reader = replica.open_reader().unwrap();
                assert_integrity(reader.connection());
                assert_eq!(dump(reader.connection()), want);
                assert_same_answers(&mut random, reader.connection(), &plain);
            }
            assert_integrity(writer.connection());
        }
    }
    stop.store(true, SeqCst);
    let reads: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert!(reads > 0);
    writer.discard();
    pins.iter().for_each(assert_whole);

    // After a last checkpoint the files are plain SQLite databases, equal byte for byte.
    for replica in [&leader, &follower] {
        replica.checkpoint(replica.pin(), position(index + 1)).unwrap();
    }
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(read("leader.sqlite") == read("follower.sqlite"));
    assert!(!folder.path().join("leader.sqlite-wal").exists());
    let file = Connection::open(folder.path().join("leader.sqlite")).unwrap();
    assert_integrity(&file);
    assert_eq!(dump(&file), dump(&plain));
}

#[test]
fn pages_of_4096_bytes() {
    verify(4096, 200, 0, 600, 1);
}

#[test]
fn a_cache_so_small_that_transactions_spill() {
    verify(4096, 10, 0, 600, 2);
}

#[test]
fn small_pages() {
    verify(512, 20, 0, 400, 3);
}

#[test]
fn large_pages() {
    verify(65536, 10, 0, 300, 4);
}

#[test]
fn a_database_that_shrinks_by_itself() {
    verify(1024, 30, 1, 400, 5);
}

#[test]
fn a_database_that_shrinks_when_told() {
    verify(8192, 10, 2, 400, 6);
}

/// As the tests above, for as long as one likes: `SEED=7 STEPS=4000 cargo test ... -- --ignored at_length`.
#[test]
#[ignore = "takes minutes"]
fn equality_at_length() {
    let number = |name: &str, otherwise: u64| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let mut random = Random::new(number("SEED", 7));
    for round in 0..number("ROUNDS", 12) {
        let page_size = 512 << random.below(8);
        let (cache_pages, auto_vacuum) = ([10, 50, 200][random.below(3) as usize], random.below(3) as u32);
        let seed = random.next();
        println!(
            "round {round}: {page_size} bytes a page, cache of {cache_pages}, auto_vacuum {auto_vacuum}, seed {seed}"
        );
        verify(page_size, cache_pages, auto_vacuum, number("STEPS", 2000) as usize, seed);
    }
}

/// Readers that look at whole versions while commits and checkpoints go on under them.
#[test]
fn pinned_versions_stay_whole_under_concurrent_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let leader = open(folder.path(), "leader", &options(512));
    let mut writer = leader.open_writer().unwrap();
    writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
    seal_and_commit(&mut writer, &leader).unwrap();
    /// Rounds at least, and what each other thread has to get done meanwhile.
    const ROUNDS: u64 = 1000;
    const LOOKS: u64 = 20;
    let stop = AtomicBool::new(false);
    let done: [AtomicU64; 4] = Default::default();
    std::thread::scope(|scope| {
        // Ends the others whatever happens here.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, SeqCst);
            }
        }
        let _stop = Stop(&stop);
        let others: Vec<_> = done
            .iter()
            .enumerate()
            .map(|(thread, done)| {
                let (leader, stop) = (&leader, &stop);
                scope.spawn(move || {
                    // Of one thread, from several versions on.
                    let mut old: VecDeque<_> = (0..6).map(|_| leader.pin()).collect();
                    let mut random = Random::new(thread as u64);
                    while !stop.load(SeqCst) {
                        let pin = leader.pin();
                        if thread == 0 {
                            old.clear();
                            leader.checkpoint(pin, position(done.load(SeqCst))).unwrap();
                        } else if thread == 1 {
                            assert_whole(&old[random.below(6) as usize]);
                            if random.below(3) == 0 {
                                old.remove(random.below(6) as usize);
                                old.push_back(pin);
                            }
                        } else {
                            old.clear();
                            (0..4).for_each(|_| assert_whole(&pin));
                        }
                        done.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        let mut random = Random::new(8);
        let mut round = 0;
        while round < ROUNDS || done.iter().any(|done| done.load(SeqCst) < LOOKS) {
            assert!(others.iter().all(|other| !other.is_finished()), "a thread has failed");
            round += 1;
            let length = random.below(700);
            let row = (random.below(40) as i64, random.blob(length));
            writer.connection().execute("INSERT OR REPLACE INTO t VALUES (?, ?)", row).unwrap();
            if round % 50 == 0 {
                writer.connection().execute_batch("DELETE FROM t WHERE k % 3 = 0; VACUUM").unwrap();
            }
            if random.below(4) > 0 {
                seal_and_commit(&mut writer, &leader).unwrap();
            }
        }
    });
    writer.discard();
    assert!(leader.verify().unwrap());
    // Nobody holds anything any more.
    leader.checkpoint(leader.pin(), position(u64::MAX)).unwrap();
    leader.checkpoint(leader.pin(), position(u64::MAX)).unwrap();
    let statistics = leader.statistics();
    assert_eq!(statistics.held_bytes, 0);
    assert!(statistics.memory_bytes < 2 * 1024, "{statistics:?}");
}

/// SQLite never writes the page that holds byte 2^30: a database that grows over it is equal everywhere all the same.
#[test]
#[ignore = "writes 4 GiB"]
fn a_database_over_the_lock_byte_page() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(65536);
    let leader = open(folder.path(), "leader", &options);
    let follower = open(folder.path(), "follower", &options);
    let mut writer = leader.open_writer().unwrap();
    writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
    let mut index = 0;
    while leader.pin().page_count() < 16_500 {
        index += 1;
        writer.connection().execute("INSERT INTO t VALUES (?, zeroblob(50000000))", [index as i64]).unwrap();
        follower.apply(&seal_and_commit(&mut writer, &leader).unwrap()).unwrap();
        for replica in [&leader, &follower] {
            replica.checkpoint(replica.pin(), position(index)).unwrap();
        }
    }
    assert_same_pages(&leader, &follower);
    writer.connection().execute_batch("DELETE FROM t WHERE k > 2; PRAGMA incremental_vacuum").unwrap();
    follower.apply(&seal_and_commit(&mut writer, &leader).unwrap()).unwrap();
    assert_same_pages(&leader, &follower);
    let file = Connection::open(folder.path().join("follower.sqlite")).unwrap();
    assert_integrity(&file);
}

#[test]
fn a_restarted_replica_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(4096);
    let leader = open(folder.path(), "leader", &options);
    let mut log = Vec::new();
    {
        let mut writer = leader.open_writer().unwrap();
        writer.connection().execute_batch("CREATE TABLE t(x)").unwrap();
        log.push(seal_and_commit(&mut writer, &leader).unwrap());
        for number in 0..200 {
            writer.connection().execute("INSERT INTO t VALUES (?)", [number]).unwrap();
            log.push(seal_and_commit(&mut writer, &leader).unwrap());
        }
    }
    for restart_at in [1, 57, 200] {
        let name = format!("follower-{restart_at}");
        let follower = open(folder.path(), &name, &options);
        for page_set in &log[..restart_at] {
            follower.apply(page_set).unwrap();
        }
        follower.checkpoint(follower.pin(), position(restart_at as u64)).unwrap();
        drop(follower);
        let (follower, mark) = Replica::open(folder.path(), &name, options.clone()).unwrap();
        let mark = mark.unwrap();
        assert_eq!((mark.position.index, mark.version.0), (restart_at as u64, restart_at as u64));
        for page_set in &log[restart_at..] {
            follower.apply(page_set).unwrap();
        }
        assert_same_pages(&leader, &follower);
    }
}
