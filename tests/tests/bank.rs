//! kill -9 of the leader and of others under interactive transactions that move money between accounts.
//!
//! Every reader, on every member, at every moment, must find the same sum; at the end every acknowledged transfer is there, and the
//! accounts are what the transfers make of them.
//!
//! BANK_SECONDS (default 20) and CRASH_SEED choose the run; the seed is printed.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use parking_lot::Mutex;
use raft_sqlite::{Client, Database, ErrorClass, ReadConsistency, TransactionError, TransactionOptions};
use raft_sqlite_tests::cluster::{Cluster, SERVER_VARIABLE};
use raft_sqlite_tests::ledger::compare_files;
use raft_sqlite_tests::wait;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const NODES: usize = 3;
const ACCOUNTS: i64 = 10;
const START: i64 = 100;
const TELLERS: u64 = 8;
const AUDITORS: u64 = 3;

const SCHEMA: &str = "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER NOT NULL CHECK (balance >= 0));
    CREATE TABLE transfer(id INTEGER PRIMARY KEY, payer INTEGER NOT NULL REFERENCES account,
        payee INTEGER NOT NULL REFERENCES account, amount INTEGER NOT NULL);
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 9) INSERT INTO account SELECT i, 100 FROM n;";

#[derive(Default)]
struct Books {
    acknowledged: Mutex<HashSet<i64>>,
    asked: AtomicU64,
    audits: AtomicU64,
    stop: AtomicBool,
}

/// One transfer: None when there is not enough, and it was rolled back.
async fn transfer(db: &Database, id: i64, random: &mut StdRng) -> Result<Option<()>, TransactionError> {
    let payer = random.random_range(0..ACCOUNTS);
    let payee = (payer + random.random_range(1..ACCOUNTS)) % ACCOUNTS;
    let amount = random.random_range(1..START / 2);
    let bounds = TransactionOptions { total_timeout: Duration::from_secs(5), ..Default::default() };
    let mut tx = db.begin_with(bounds).await?;
    let balance: i64 = tx.query_row(("SELECT balance FROM account WHERE id = ?", [payer])).await?.get(0)?;
    if balance < amount {
        tx.rollback().await?;
        return Ok(None);
    }
    // What was read is what is written: without isolation money would come and go.
    tx.execute(("UPDATE account SET balance = ? WHERE id = ?", [balance - amount, payer])).await?;
    tx.execute(("UPDATE account SET balance = balance + ? WHERE id = ?", [amount, payee])).await?;
    tx.execute(("INSERT INTO transfer VALUES (?, ?, ?, ?)", [id, payer, payee, amount])).await?;
    tx.commit().await?;
    Ok(Some(()))
}

async fn teller(number: u64, addresses: Vec<String>, books: Arc<Books>, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed ^ ((number + 1) << 32));
    // Half of them know one member only.
    let known = if number.is_multiple_of(2) { addresses } else { vec![addresses[number as usize % NODES].clone()] };
    let db = wait::until("a client", || async { Ok(Client::connect(known.clone()).await?) }).await?.database("bank");
    let mut id = number as i64 * 1_000_000;
    while !books.stop.load(Ordering::Relaxed) {
        id += 1;
        books.asked.fetch_add(1, Ordering::Relaxed);
        match transfer(&db, id, &mut random).await {
            Ok(Some(())) => drop(books.acknowledged.lock().insert(id)),
            Ok(None) => {}
            // It did not happen, or may have: the audit at the end knows.
            Err(error) if matches!(error.class(), ErrorClass::Retryable | ErrorClass::OutcomeUnknown) => {}
            Err(error) => bail!("transfer {id}: {error:?}"),
        }
    }
    Ok(())
}

async fn auditor(number: u64, addresses: Vec<String>, books: Arc<Books>) -> Result<()> {
    let known = vec![addresses[number as usize % NODES].clone()];
    let db = wait::until("a client", || async { Ok(Client::connect(known.clone()).await?) }).await?.database("bank");
    let db = db.with_timeout(Duration::from_secs(2));
    while !books.stop.load(Ordering::Relaxed) {
        let how = if number == 0 { ReadConsistency::Linearizable } else { ReadConsistency::Local };
        // In two statements of one version each, and row by row.
        match db.query_as::<(i64, i64)>("SELECT id, balance FROM account", how).await {
            Ok(accounts) => {
                let sum: i64 = accounts.iter().map(|(_, balance)| balance).sum();
                ensure!(
                    accounts.len() as i64 == ACCOUNTS && sum == ACCOUNTS * START,
                    "through {known:?} ({how:?}) there were {sum} in {accounts:?}"
                );
                books.audits.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if error.class() == ErrorClass::Rejected => bail!("audit: {error:?}"),
            // The member is down.
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn money_neither_comes_nor_goes() -> Result<()> {
    if std::env::var_os(SERVER_VARIABLE).is_some() {
        return Ok(());
    }
    let seconds: u64 = std::env::var("BANK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let seed: u64 = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed} BANK_SECONDS={seconds}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start_with(
        NODES,
        &["--snapshot-count", "500", "--election-timeout", "500", "--heartbeat-interval", "50"],
    )
    .await?;
    let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.peer_url.clone()).collect();
    let db = Client::connect(addresses.clone()).await?.database("bank");
    db.execute_batch(SCHEMA).await?;
    wait::until("the accounts on all members", || async {
        for address in &addresses {
            Client::connect([address])
                .await?
                .database("bank")
                .query_row("SELECT 1 FROM account", ReadConsistency::Local)
                .await?;
        }
        Ok(())
    })
    .await?;

    let books = Arc::new(Books::default());
    let mut people = tokio::task::JoinSet::new();
    for number in 0..TELLERS {
        people.spawn(teller(number, addresses.clone(), books.clone(), seed));
    }
    for number in 0..AUDITORS {
        people.spawn(auditor(number, addresses.clone(), books.clone()));
    }
    let start = Instant::now();
    let mut kills = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_millis(random.random_range(300..2000))).await;
        if let Some(ended) = people.try_join_next() {
            ended??;
        }
        let victim = match random.random_range(0..3) {
            0 => random.random_range(0..NODES),
            _ => cluster.leader().await?,
        };
        ensure!(cluster.is_running(victim), "{} ended by itself\n{}", cluster.nodes[victim].name, cluster.logs());
        cluster.kill(victim)?;
        kills += 1;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..1500))).await;
        cluster.spawn(victim)?;
        cluster.wait_node_ready(victim).await?;
    }
    books.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = people.join_next().await {
        ended??;
    }

    let transfers: Vec<(i64, i64, i64, i64)> =
        db.query_as("SELECT id, payer, payee, amount FROM transfer", ReadConsistency::Linearizable).await?;
    let acknowledged = std::mem::take(&mut *books.acknowledged.lock());
    println!(
        "{kills} kills; {} transfers asked for, {} acknowledged, {} there; {} audits",
        books.asked.load(Ordering::Relaxed),
        acknowledged.len(),
        transfers.len(),
        books.audits.load(Ordering::Relaxed)
    );
    ensure!(acknowledged.len() > 20 && books.audits.load(Ordering::Relaxed) > 20, "hardly anything happened");
    let there: HashSet<i64> = transfers.iter().map(|(id, ..)| *id).collect();
    let lost: Vec<_> = acknowledged.difference(&there).collect();
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let mut balances = vec![START; ACCOUNTS as usize];
    for (_, payer, payee, amount) in transfers {
        balances[payer as usize] -= amount;
        balances[payee as usize] += amount;
    }
    let found: Vec<i64> = db.query_as("SELECT balance FROM account ORDER BY id", ReadConsistency::Linearizable).await?;
    ensure!(found == balances, "the accounts have {found:?}, the transfers make {balances:?}");
    compare_files(&mut cluster, &["bank", "etcd"]).await
}
