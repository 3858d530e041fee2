//! The etcd API, called directly.

use std::time::Duration;

use anyhow::Result;
use kine_adapter::proto::etcdserverpb::kv_client::KvClient;
use kine_adapter::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use kine_adapter::proto::etcdserverpb::{PutRequest, RangeRequest, StatusRequest, StatusResponse};
use tonic::transport::{Channel, Endpoint};

/// A connection with time-outs that fit nodes being killed.
pub async fn connect(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(Duration::from_secs(1))
        .timeout(Duration::from_secs(10))
        .tcp_nodelay(true);
    Ok(endpoint.connect().await?)
}

/// The gRPC status behind an error of this module.
pub fn grpc_status(error: &anyhow::Error) -> Option<&tonic::Status> {
    error.downcast_ref()
}

/// Maintenance.Status.
pub async fn status(url: &str) -> Result<StatusResponse> {
    let mut client = MaintenanceClient::new(connect(url).await?);
    Ok(client.status(StatusRequest {}).await?.into_inner())
}

/// Puts a key; its revision.
pub async fn put(channel: &Channel, key: &str, value: &str) -> Result<i64> {
    let request = PutRequest {
        key: key.as_bytes().to_vec().into(),
        value: value.as_bytes().to_vec().into(),
        ..PutRequest::default()
    };
    let answer = KvClient::new(channel.clone()).put(request).await?.into_inner();
    Ok(answer.header.map_or(0, |header| header.revision))
}

/// A key's value, linearizable or from the node asked.
pub async fn get(channel: &Channel, key: &str, serializable: bool) -> Result<Option<String>> {
    let request = RangeRequest { key: key.as_bytes().to_vec().into(), serializable, ..RangeRequest::default() };
    let answer = KvClient::new(channel.clone()).range(request).await?.into_inner();
    Ok(answer.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
}

/// All keys with a prefix, and their values.
pub async fn get_prefix(channel: &Channel, prefix: &str) -> Result<Vec<(String, String)>> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    let request =
        RangeRequest { key: prefix.as_bytes().to_vec().into(), range_end: end.into(), ..RangeRequest::default() };
    let mut client = KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
    let answer = client.range(request).await?.into_inner();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(answer.kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect())
}
