//! Requests that are too large: refused with etcd's words, and the next one on the same connection is served.

use anyhow::{Result, ensure};
use kine_adapter::proto::etcdserverpb::kv_client::KvClient;
use kine_adapter::proto::etcdserverpb::request_op::Request;
use kine_adapter::proto::etcdserverpb::{PutRequest, RequestOp, TxnRequest};
use raft_sqlite_tests::cluster::Cluster;
use raft_sqlite_tests::etcd;
use tonic::{Code, Status};

use crate::{ONE_AT_A_TIME, QUICK};

fn put(key: String, value_bytes: usize) -> PutRequest {
    PutRequest { key: key.into_bytes().into(), value: vec![7; value_bytes].into(), ..PutRequest::default() }
}

fn txn(operations: usize, value_bytes: usize) -> TxnRequest {
    let operation =
        |number| RequestOp { request: Some(Request::RequestPut(put(format!("large/txn/{number}"), value_bytes))) };
    TxnRequest { success: (0..operations).map(operation).collect(), ..TxnRequest::default() }
}

fn expect<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, text: &str) -> Result<()> {
    match answer {
        Err(status) if status.code() == code && status.message().contains(text) => Ok(()),
        other => anyhow::bail!("{text:?} was expected, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_large_requests_are_refused_and_the_next_is_served() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start_with(3, QUICK).await?;
    // The leader and its followers: both refuse before anything is forwarded.
    for node in &cluster.nodes {
        let channel = etcd::connect(&node.client_url).await?;
        let mut client = KvClient::new(channel.clone());
        let too_large = "etcdserver: request is too large";
        expect(client.put(put("large/put".into(), 1_600_000)).await, Code::InvalidArgument, too_large)?;
        etcd::put(&channel, "small", "1").await?;
        // Beyond what one message may have, gRPC itself refuses, as grpc-go does.
        let message = "received message larger than max";
        expect(client.put(put("large/put".into(), 4_000_000)).await, Code::ResourceExhausted, message)?;
        etcd::put(&channel, "small", "2").await?;
        expect(client.put(put("large/put".into(), 100 << 20)).await, Code::ResourceExhausted, message)?;
        etcd::put(&channel, "small", "3").await?;
        expect(client.txn(txn(100, 20_000)).await, Code::InvalidArgument, too_large)?;
        etcd::put(&channel, "small", "4").await?;
        let too_many = "etcdserver: too many operations in txn request";
        expect(client.txn(txn(129, 1)).await, Code::InvalidArgument, too_many)?;
        etcd::put(&channel, "small", "5").await?;
        client.txn(txn(128, 10_000)).await?;
        ensure!(etcd::get_prefix(&channel, "large/").await?.len() == 128, "something refused had an effect");
        ensure!(etcd::get(&channel, "small", false).await?.as_deref() == Some("5"), "a small write is lost");
    }
    Ok(())
}
