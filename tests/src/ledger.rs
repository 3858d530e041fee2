//! What a cluster has acknowledged, and whether it is all there.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use parking_lot::Mutex;

use crate::cluster::Cluster;
use crate::{etcd, wait};

/// Rising values, each key written by one writer at a time.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Key to the value of its last acknowledged write.
    acknowledged: Mutex<BTreeMap<String, u64>>,
    /// Key to the highest value that was ever sent.
    sent: Mutex<BTreeMap<String, u64>>,
}

impl Ledger {
    /// Before a write goes out.
    pub fn sending(&self, key: &str, value: u64) {
        self.sent.lock().insert(key.to_owned(), value);
    }

    /// After its acknowledgement.
    pub fn acknowledged(&self, key: &str, value: u64) {
        self.acknowledged.lock().insert(key.to_owned(), value);
    }

    /// How many keys have an acknowledged value.
    pub fn acknowledged_count(&self) -> usize {
        self.acknowledged.lock().len()
    }

    /// The sum of the highest values sent.
    pub fn sent_sum(&self) -> u64 {
        self.sent.lock().values().sum()
    }

    /// Every acknowledged write must be there or overwritten by a later one, and nothing that was never sent. A value ends at its
    /// first space: what follows is padding.
    ///
    /// # Errors
    /// What is lost or made up.
    pub fn check(&self, found: &[(String, String)], place: &str) -> Result<()> {
        let found: BTreeMap<&str, u64> = found
            .iter()
            .map(|(key, value)| Ok((key.as_str(), value.split(' ').next().unwrap_or_default().parse()?)))
            .collect::<Result<_>>()
            .context("a value that no writer wrote")?;
        for (key, value) in self.acknowledged.lock().iter() {
            match found.get(key.as_str()) {
                None => bail!("{place}: {key} = {value} was acknowledged and is lost"),
                Some(there) if there < value => bail!("{place}: {key} = {value} was acknowledged, {there} is there"),
                Some(_) => {}
            }
        }
        for (key, value) in &found {
            let sent = self.sent.lock().get(*key).copied().unwrap_or(0);
            ensure!(*value <= sent, "{place}: {key} = {value}, but only {sent} was ever sent");
        }
        Ok(())
    }

    /// The same for every node of a cluster, whose lists must be equal.
    ///
    /// # Errors
    /// What is lost, made up or different, or a node that cannot be read.
    pub async fn check_nodes(&self, cluster: &Cluster, prefix: &str) -> Result<()> {
        let mut lists = Vec::new();
        for node in &cluster.nodes {
            let found = wait::until("a linearizable list", || async {
                etcd::get_prefix(&etcd::connect(&node.client_url).await?, prefix).await
            })
            .await?;
            self.check(&found, &node.name)?;
            lists.push(found);
        }
        ensure!(lists.windows(2).all(|pair| pair[0] == pair[1]), "the nodes list different states");
        Ok(())
    }
}

/// Stops a cluster all of whose nodes run. The database files must then stand alone, pass SQLite's check, and be equal byte for byte.
///
/// # Errors
/// What is not so.
pub async fn stop_and_compare(cluster: &mut Cluster) -> Result<()> {
    compare_files(cluster, &["etcd"]).await
}

/// The same for databases by name.
pub async fn compare_files(cluster: &mut Cluster, databases: &[&str]) -> Result<()> {
    wait::until("all nodes at the same applied index", || async {
        let mut indexes = Vec::new();
        for node in &cluster.nodes {
            indexes.push(etcd::status(&node.client_url).await?.raft_applied_index);
        }
        ensure!(indexes.windows(2).all(|pair| pair[0] == pair[1]), "applied {indexes:?}");
        Ok(())
    })
    .await?;
    for index in 0..cluster.nodes.len() {
        let code = cluster.stop(index)?;
        ensure!(code == Some(0), "{} ended with {code:?}\n{}", cluster.nodes[index].name, cluster.logs());
    }
    for database in databases {
        compare_database(cluster, database)?;
    }
    Ok(())
}

fn compare_database(cluster: &Cluster, database: &str) -> Result<()> {
    let mut files = Vec::new();
    for node in &cluster.nodes {
        let path = node.data_dir.join(format!("db/{database}.sqlite"));
        ensure!(!path.with_extension("sqlite-wal").exists(), "{}: a WAL is left", path.display());
        let connection = rusqlite::Connection::open(&path)?;
        let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        ensure!(verdict == "ok", "{}: {verdict}", path.display());
        drop(connection);
        files.push(std::fs::read(&path)?);
    }
    ensure!(files.windows(2).all(|pair| pair[0] == pair[1]), "the files of {database} differ");
    Ok(())
}
