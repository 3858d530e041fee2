//! What a program sees of its nodes: metrics that say what happened, and spans.

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use raft_sqlite::metrics::{MetricValue, Metrics};
use raft_sqlite::{Node, NodeConfig, ReadConsistency, Statement, WriteError};
use tracing_subscriber::layer::{Context, SubscriberExt as _};

use crate::nodes::{Nodes, PATIENCE};

fn value(metrics: &Metrics, name: &str) -> f64 {
    let family = metrics.get(name).unwrap_or_else(|| panic!("no metric {name}"));
    match family.samples.as_slice() {
        [] => panic!("{name} has no value"),
        samples => samples
            .iter()
            .map(|sample| match &sample.value {
                MetricValue::Number(value) => *value,
                MetricValue::Histogram(histogram) => histogram.count() as f64,
            })
            .sum(),
    }
}

fn labelled(metrics: &Metrics, name: &str, label: &str, wanted: &str) -> f64 {
    let samples = &metrics.get(name).unwrap_or_else(|| panic!("no metric {name}")).samples;
    let sample = samples.iter().find(|sample| sample.labels.contains(&(label, wanted.to_owned())));
    match sample.unwrap_or_else(|| panic!("{name} has no {label}={wanted}: {samples:?}")).value {
        MetricValue::Number(value) => value,
        MetricValue::Histogram(_) => panic!("{name} is a histogram"),
    }
}

/// Waits until a metric is as it should be.
async fn until(node: &Node, name: &str, as_wanted: impl Fn(f64) -> bool) -> f64 {
    let start = Instant::now();
    loop {
        let now = value(&node.metrics(), name);
        if as_wanted(now) {
            return now;
        }
        assert!(start.elapsed() < PATIENCE, "{name} stays {now}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_happened() {
    let nodes = Nodes::start(4096).await;
    let leader = nodes.leader().await;
    let database = leader.database("app");
    database.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v)").await.unwrap();
    let before = leader.metrics();
    for key in 0..50i64 {
        let insert = Statement::new("INSERT INTO t VALUES (?, randomblob(2000))").bind(key);
        database.execute(insert).await.unwrap();
    }
    for _ in 0..3 {
        assert!(matches!(database.execute("INSERT INTO t VALUES (1, 1)").await, Err(WriteError::Closure(_))));
    }
    let after = leader.metrics();
    let grown = |name: &str| value(&after, name) - value(&before, name);
    assert_eq!(grown("raft_sqlite_writes_total"), 50.0);
    for name in ["raft_sqlite_writer_wait_seconds", "raft_sqlite_transaction_duration_seconds"] {
        assert_eq!(grown(name), 53.0, "{name}");
    }
    let rejected = |metrics: &Metrics| labelled(metrics, "raft_sqlite_write_errors_total", "class", "rejected");
    assert_eq!(rejected(&after) - rejected(&before), 3.0);
    for name in [
        "raft_sqlite_proposals_total",
        "raft_sqlite_proposal_duration_seconds",
        "raft_sqlite_entry_transactions",
        "raft_sqlite_entry_bytes",
        "raft_sqlite_applied_index",
        "raft_sqlite_commit_index",
        "raft_sqlite_apply_duration_seconds",
    ] {
        // One after another: each in an entry of its own. (A member that publishes its addresses adds entries.)
        assert!((50.0..60.0).contains(&grown(name)), "{name}: {}", grown(name));
    }
    assert!(grown("raft_sqlite_log_fsync_duration_seconds") >= 50.0);
    assert!(grown("raft_sqlite_log_append_duration_seconds") >= 50.0);
    assert!(grown("raft_sqlite_log_written_bytes_total") > 50.0 * 2000.0);
    for (name, wanted) in [
        ("raft_sqlite_has_leader", 1.0),
        ("raft_sqlite_is_leader", 1.0),
        ("raft_sqlite_writable", 1.0),
        ("raft_sqlite_broken", 0.0),
        ("raft_sqlite_proposals_pending", 0.0),
        ("raft_sqlite_proposals_failed_total", 0.0),
        ("raft_sqlite_state_hash_mismatches_total", 0.0),
        ("raft_sqlite_database_writers_queued", 0.0),
        ("raft_sqlite_database_readers", 0.0),
    ] {
        assert_eq!(value(&after, name), wanted, "{name}");
    }
    assert!(labelled(&after, "raft_sqlite_database_bytes", "database", "app") > 100_000.0);

    // A follower forwards, reads, and knows that it does not lead.
    let follower = (0..3).map(|number| nodes.node(number)).find(|node| node.id() != leader.id()).unwrap();
    let before = follower.metrics();
    follower.database("app").execute("DELETE FROM t WHERE k = 49").await.unwrap();
    follower.database("app").query("SELECT count(*) FROM t", ReadConsistency::Linearizable).await.unwrap();
    let after = follower.metrics();
    for (name, wanted) in
        [("raft_sqlite_is_leader", 0.0), ("raft_sqlite_has_leader", 1.0), ("raft_sqlite_is_voter", 1.0)]
    {
        assert_eq!(value(&after, name), wanted, "{name}");
    }
    for (name, wanted) in [
        ("raft_sqlite_calls_forwarded_total", 1.0),
        ("raft_sqlite_reads_total", 1.0),
        ("raft_sqlite_read_duration_seconds", 1.0),
        ("raft_sqlite_writes_total", 0.0),
    ] {
        assert_eq!(value(&after, name) - value(&before, name), wanted, "{name}");
    }
    // A long read holds old images.
    let (release, held) = std::sync::mpsc::channel::<()>();
    let reading = database.clone();
    let long_read = tokio::spawn(async move { reading.read(move |_, _| held.recv()).await });
    until(leader, "raft_sqlite_database_readers", |readers| readers == 1.0).await;
    database.execute("UPDATE t SET v = randomblob(2000)").await.unwrap();
    let now = leader.metrics();
    let memory = |kind: &str| labelled(&now, "raft_sqlite_database_memory_bytes", "kind", kind);
    assert!(memory("pinned") > 50_000.0, "{}", memory("pinned"));
    assert!(memory("all") >= memory("pinned"));
    assert!(value(&now, "raft_sqlite_database_oldest_reader_seconds") > 0.0);
    release.send(()).unwrap();
    long_read.await.unwrap().unwrap().unwrap();
    until(leader, "raft_sqlite_database_readers", |readers| readers == 0.0).await;
    // Checkpoints (every 40 entries, and a first one whenever it came).
    for key in 1000..1060i64 {
        database.execute(("INSERT INTO t VALUES (?, randomblob(2000))", [key])).await.unwrap();
    }
    until(leader, "raft_sqlite_checkpoint_duration_seconds", |count| count >= 1.0).await;
    until(leader, "raft_sqlite_checkpoint_pages_total", |pages| pages >= 20.0).await;
    let pages = value(&leader.metrics(), "raft_sqlite_checkpoint_pages_total");
    assert!(value(&leader.metrics(), "raft_sqlite_checkpoint_bytes_total") >= pages * 4096.0);

    // The leader sees who lags.
    follower.shutdown().await.unwrap();
    for key in 100..130i64 {
        database.execute(Statement::new("INSERT INTO t VALUES (?, 1)").bind(key)).await.unwrap();
    }
    let peer = follower.id().to_string();
    let lag = labelled(&leader.metrics(), "raft_sqlite_peer_lag_entries", "peer", &peer);
    assert!(lag >= 30.0, "{lag}");
}

#[tokio::test(flavor = "multi_thread")]
async fn elections_are_counted() {
    let nodes = Nodes::start(4096).await;
    let old = nodes.leader().await;
    let changes = value(&old.metrics(), "raft_sqlite_leader_changes_total");
    old.transfer_leader(None).await.unwrap();
    until(old, "raft_sqlite_leader_changes_total", |now| now > changes).await;
    let elections: f64 = (0..3).map(|number| value(&nodes.node(number).metrics(), "raft_sqlite_elections_total")).sum();
    assert!(elections >= 1.0, "{elections}");
}

/// Names of metrics in the text of docs/operations.md: `raft_sqlite_...` in backquotes.
#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_documented_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    let shown: BTreeSet<String> = node.metrics().families.into_iter().map(|family| family.name).collect();
    node.shutdown().await.unwrap();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operations.md");
    let text = std::fs::read_to_string(path).unwrap();
    let documented: BTreeSet<String> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|quoted| quoted.starts_with("raft_sqlite_"))
        .map(|quoted| quoted.split('{').next().unwrap().to_owned())
        .collect();
    assert_eq!(shown, documented);
}

/// Names of the spans that were closed, with the names of their fields.
static SPANS: Mutex<BTreeSet<(&'static str, String)>> = Mutex::new(BTreeSet::new());

struct Collect;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Collect {
    fn on_new_span(&self, attributes: &tracing::span::Attributes<'_>, _: &tracing::span::Id, _: Context<'_, S>) {
        let metadata = attributes.metadata();
        if metadata.target().starts_with("raft_sqlite") {
            let fields: Vec<&str> = metadata.fields().iter().map(|field| field.name()).collect();
            SPANS.lock().unwrap().insert((metadata.name(), fields.join(",")));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_elections_and_checkpoints_have_spans() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Collect)).unwrap();
    });
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let mut leadership = node.leadership();
    leadership.wait_for(|now| now.writable_here).await.unwrap();
    let inside = node
        .database("app")
        .write(|context| {
            context.connection().execute_batch("CREATE TABLE t(a)")?;
            Ok::<_, raft_sqlite::rusqlite::Error>(tracing::Span::current().metadata().map(|span| span.name()))
        })
        .await
        .unwrap();
    assert_eq!(inside, Some("write"), "the closure runs in the caller's span");
    node.shutdown().await.unwrap();
    let spans = SPANS.lock().unwrap().clone();
    for wanted in [
        ("write", "database,outcome"),
        ("entry", "database,term,version,transactions,bytes"),
        ("apply", "term,index,bytes"),
        ("election", "term,outcome"),
        ("checkpoint", "term,index"),
    ] {
        assert!(spans.contains(&(wanted.0, wanted.1.to_owned())), "{wanted:?} is not among {spans:?}");
    }
}
