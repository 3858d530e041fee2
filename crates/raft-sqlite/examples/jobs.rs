//! A job queue: three workers on three nodes take jobs in interactive transactions. A job that fails is tried again, one whose worker
//! dies is free again at once, and each takes effect exactly once.
//!
//! `cargo run -p raft-sqlite --example jobs`

use std::time::Duration;

use raft_sqlite::{
    Database, ErrorClass, InitialMember, Migration, Node, NodeConfig, ReadConsistency, Transaction, TransactionError,
};

const JOBS: i64 = 30;
const MOST_TRIES: i64 = 3;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let mut nodes = Vec::new();
    let members = members()?;
    for member in &members {
        let config = NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone())?;
        nodes.push(Node::start(config).await?);
    }
    nodes[0].wait_for_leader(Duration::from_secs(30)).await?;
    let db: Database = nodes[0].database("jobs").into();
    db.migrate(&[Migration::new(
        1,
        "the queue and what comes of it",
        "CREATE TABLE job(id INTEGER PRIMARY KEY, number INTEGER NOT NULL, tries INTEGER NOT NULL DEFAULT 0);
         CREATE TABLE square(number INTEGER PRIMARY KEY, square INTEGER NOT NULL, worker TEXT NOT NULL);
         CREATE TABLE given_up(number INTEGER PRIMARY KEY, why TEXT NOT NULL);",
    )])
    .await?;
    db.batch((1..=JOBS).map(|number| ("INSERT INTO job(number) VALUES (?)", [number]).into()).collect()).await?;

    // A worker that dies in the middle of its first job: it had taken it, but nothing of that stays.
    let mut abandoned = nodes[1].database("jobs").begin().await?;
    let (_, number) = take(&mut abandoned).await?.ok_or("there are jobs")?;
    println!("a worker dies with job {number}");
    drop(abandoned);

    let working: Vec<_> = nodes
        .iter()
        .map(|node| {
            let (db, worker) = (node.database("jobs").into(), node.name().to_owned());
            tokio::spawn(async move { work(db, &worker).await })
        })
        .collect();
    for worker in working {
        let (worker, done) = worker.await??;
        println!("{worker} has done {done} jobs");
    }
    let counts = "SELECT (SELECT count(*) FROM square), (SELECT count(*) FROM given_up), (SELECT count(*) FROM job)";
    let row = db.query_row(counts, ReadConsistency::Linearizable).await?;
    let (squares, given_up, left) = (row.get::<i64>(0)?, row.get::<i64>(1)?, row.get::<i64>(2)?);
    println!("{squares} squares, {given_up} given up, {left} jobs left");
    for node in &nodes {
        node.shutdown().await?;
    }
    Ok(())
}

/// Until the queue is empty: the worker's name, and how many jobs it has done.
async fn work(db: Database, worker: &str) -> Result<(String, u32), TransactionError> {
    let mut done = 0;
    loop {
        match work_once(&db, worker).await {
            Ok(true) => done += 1,
            Ok(false) => return Ok((worker.to_owned(), done)),
            // Rolled back, or perhaps not: the job is in the queue, or it is done. Either way the queue knows.
            Err(error) if matches!(error.class(), ErrorClass::Retryable | ErrorClass::OutcomeUnknown) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// One job, in one transaction with what it does. False: there is none.
async fn work_once(db: &Database, worker: &str) -> Result<bool, TransactionError> {
    let mut tx = db.begin().await?;
    let Some((id, number)) = take(&mut tx).await? else {
        tx.rollback().await?;
        return Ok(false);
    };
    // What the job does is undone alone when it fails: that it was tried stays.
    tx.savepoint("job").await?;
    match run(&mut tx, number, worker).await {
        Ok(()) => {
            tx.execute(("DELETE FROM job WHERE id = ?", [id])).await?;
        }
        Err(TransactionError::Sql(refused)) => {
            tx.rollback_to("job").await?;
            let give_up = (
                "INSERT INTO given_up SELECT number, ? FROM job WHERE id = ? AND tries >= ?",
                (refused.message, id, MOST_TRIES),
            );
            tx.execute(give_up).await?;
            tx.execute(("DELETE FROM job WHERE id = ? AND tries >= ?", [id, MOST_TRIES])).await?;
        }
        Err(error) => return Err(error),
    }
    tx.release("job").await?;
    tx.commit().await?;
    Ok(true)
}

/// The job that was tried least: its id and number.
async fn take(tx: &mut Transaction) -> Result<Option<(i64, i64)>, TransactionError> {
    let first = "UPDATE job SET tries = tries + 1 WHERE id = (SELECT id FROM job ORDER BY tries, id LIMIT 1) \
                 RETURNING id, number";
    let taken = tx.query(first).await?;
    taken.into_iter().next().map(|row| Ok((row.get(0)?, row.get(1)?))).transpose()
}

async fn run(tx: &mut Transaction, number: i64, worker: &str) -> Result<(), TransactionError> {
    tx.execute(("INSERT INTO square VALUES (?1, ?1 * ?1, ?2)", (number, worker))).await?;
    if number % 10 == 0 {
        // This one never goes well.
        tx.execute("SELECT abs(-9223372036854775807 - 1)").await?;
    }
    Ok(())
}

fn members() -> std::io::Result<Vec<InitialMember>> {
    let member = |name: &str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        Ok(InitialMember { name: name.into(), peer_urls: vec![format!("http://{}", listener.local_addr()?)] })
    };
    ["anna", "bert", "cleo"].into_iter().map(member).collect()
}
