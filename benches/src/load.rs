//! The load generator: a number of clients in a closed loop, each waiting for its answer before the next request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::ValueEnum;
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use kine_adapter::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kine_adapter::proto::etcdserverpb::kv_client::KvClient;
use kine_adapter::proto::etcdserverpb::request_op::Request;
use kine_adapter::proto::etcdserverpb::response_op::Response;
use kine_adapter::proto::etcdserverpb::{Compare, PutRequest, RangeRequest, RequestOp, TxnRequest};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tonic::transport::{Channel, Endpoint};

/// Most clients that share one connection, as an apiserver's would.
const CLIENTS_PER_CONNECTION: usize = 16;

/// What each client does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Workload {
    /// Puts a random key.
    Put,
    /// Reads a random key, linearizable.
    Range,
    /// Reads a random key from the node asked.
    SerializableRange,
    /// As kube-apiserver updates an object: if its mod revision is as last seen, put, else get.
    Txn,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Workload::Put => "put",
            Workload::Range => "range",
            Workload::SerializableRange => "serializable range",
            Workload::Txn => "txn",
        })
    }
}

/// One measurement's settings.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub workload: Workload,
    pub clients: usize,
    pub duration: Duration,
    pub value_bytes: usize,
    pub keys: usize,
}

/// One measurement's outcome.
pub struct Outcome {
    pub operations: u64,
    pub failures: u64,
    pub seconds: f64,
    /// Microseconds.
    pub latency: Histogram<u64>,
}

fn key(number: usize) -> Vec<u8> {
    format!("/registry/leases/kube-node-lease/node-{number:06}").into_bytes()
}

async fn connect(urls: &[String], number: usize) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(urls[number % urls.len()].clone())?.tcp_nodelay(true);
    Ok(endpoint.connect().await?)
}

/// Puts every key once.
pub async fn fill(urls: &[String], keys: usize, value_bytes: usize) -> Result<()> {
    let workers = 32;
    let tasks = (0..workers).map(|worker| async move {
        let mut client = KvClient::new(connect(urls, worker).await?);
        for number in (worker..keys).step_by(workers) {
            let put =
                PutRequest { key: key(number).into(), value: vec![b'x'; value_bytes].into(), ..Default::default() };
            client.put(put).await?;
        }
        anyhow::Ok(())
    });
    try_join_all(tasks).await.context("filling")?;
    Ok(())
}

/// Runs one measurement.
pub async fn run(urls: &[String], settings: Settings) -> Result<Outcome> {
    let connections = settings.clients.div_ceil(CLIENTS_PER_CONNECTION).max(urls.len().min(settings.clients));
    let channels = try_join_all((0..connections).map(|number| connect(urls, number))).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let tasks: Vec<_> = (0..settings.clients)
        .map(|number| {
            let client = KvClient::new(channels[number % channels.len()].clone());
            tokio::spawn(client_loop(client, settings, number, stop.clone()))
        })
        .collect();
    tokio::time::sleep(settings.duration).await;
    stop.store(true, Ordering::Relaxed);
    let mut outcome = Outcome { operations: 0, failures: 0, seconds: 0.0, latency: histogram()? };
    for task in tasks {
        let (latency, failures) = task.await??;
        outcome.operations += latency.len();
        outcome.failures += failures;
        outcome.latency.add(latency)?;
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    Ok(outcome)
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
}

async fn client_loop(
    mut client: KvClient<Channel>,
    settings: Settings,
    number: usize,
    stop: Arc<AtomicBool>,
) -> Result<(Histogram<u64>, u64)> {
    let mut random = SmallRng::seed_from_u64(number as u64);
    let mut latency = histogram()?;
    let mut failures = 0;
    let mut value = vec![0; settings.value_bytes];
    let mut seen = std::collections::HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        let at = random.random_range(0..settings.keys);
        random.fill_bytes(&mut value);
        let begin = Instant::now();
        let done = match settings.workload {
            Workload::Put => {
                let put = PutRequest { key: key(at).into(), value: value.clone().into(), ..Default::default() };
                client.put(put).await.map(drop)
            }
            Workload::Range | Workload::SerializableRange => {
                let serializable = settings.workload == Workload::SerializableRange;
                let range = RangeRequest { key: key(at).into(), serializable, ..Default::default() };
                client.range(range).await.map(drop)
            }
            Workload::Txn => {
                // Mostly the client's own objects, as a kubelet's lease: it knows their revision.
                let own = (at / settings.clients.max(1) * settings.clients + number) % settings.keys;
                let answer = client.txn(update(own, seen.get(&own).copied().unwrap_or(0), &value)).await;
                answer.map(|answer| {
                    let answer = answer.into_inner();
                    let revision = match answer.responses.first().and_then(|op| op.response.as_ref()) {
                        Some(Response::ResponseRange(range)) => range.kvs.first().map(|kv| kv.mod_revision),
                        _ => answer.header.map(|header| header.revision),
                    };
                    seen.insert(own, revision.unwrap_or(0));
                })
            }
        };
        match done {
            Ok(()) => latency.record(begin.elapsed().as_micros().max(1) as u64)?,
            Err(_) => failures += 1,
        }
    }
    Ok((latency, failures))
}

fn update(number: usize, revision: i64, value: &[u8]) -> TxnRequest {
    let key: Bytes = key(number).into();
    let compare = Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::ModRevision(revision)),
        ..Default::default()
    };
    let put = PutRequest { key: key.clone(), value: value.to_vec().into(), ..Default::default() };
    let range = RangeRequest { key, ..Default::default() };
    TxnRequest {
        compare: vec![compare],
        success: vec![RequestOp { request: Some(Request::RequestPut(put)) }],
        failure: vec![RequestOp { request: Some(Request::RequestRange(range)) }],
    }
}
