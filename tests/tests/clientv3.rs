//! The official Go client (tests/clientv3) through each of three nodes.

use std::process::Command;

use anyhow::{Result, ensure};
use raft_sqlite_tests::cluster::Cluster;

#[tokio::test(flavor = "multi_thread")]
async fn official_go_client() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/clientv3");
    let status = Command::new("go")
        .args(["test", "-count=1", "-timeout", "10m", "./..."])
        .current_dir(folder)
        .env("ETCD_ENDPOINTS", cluster.endpoints())
        .status()?;
    ensure!(status.success(), "go test in tests/clientv3: {status}\n{}", cluster.logs());
    Ok(())
}
